"""What the harness does with each: `python -m tests.support.architectures [--write docs/models.md] [NAME ...]`."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from tests.support.architectures.outcome import BUDGET, NEW, PROMPTS, Outcome, outcome
from tests.support.architectures.table import ARCHITECTURES

NEAR = 0.05  # bfloat16's logits: rounding alone makes one to three per cent

HEAD = f"""# Models

<!-- Written by `python -m tests.support.architectures --write docs/models.md`
(transformers {transformers.__version__}); a test compares it with what the harness does. Not to be edited by hand. -->

What the harness does with {{count}} architectures of transformers, tried with tiny random models: {{exact}} are served,
{{refused}} are refused when the model is loaded, with the reason that stands there. The table is written by

    python -m tests.support.architectures --write docs/models.md

- **full**: the full cache gives the tokens of transformers' `generate` and logits equal up to float32's rounding, for
  prompts of {" and ".join(map(str, PROMPTS))} tokens and {NEW} new ones.
- **eviction**: h2o, snapkv, ahakv and streaming_llm (original positions) run beside full in one wave and keep within a
  budget of {BUDGET} entries.
- **in-cache positions** (the default of streaming_llm): a query that is turned back by 17 positions is the query at
  that place, on every layer, with a relative error below 1e-4. Where they are refused, `policy.positions=original`
  works.
- **bfloat16**: logits through the cache are within {NEAR:.0%} of float32's (median over tokens; rounding alone makes
  1 to 3 %).

A window, a chunk or a table of positions bounds the length of a text, not the model: such a model is served as far as
`model.max_prompt_tokens` and `max_new_tokens` stay within it.

`make test-oldest` and `make test-newest` run the tests of engine, policies, cache and models on both ends of the range
of versions that is allowed. Last: transformers 5.2.0, 985 passed and 32 skipped (models that it has not, or builds
otherwise); 5.24.0, 1,017 passed (November 2026, CPU, torch 2.13.0).

| architecture | full | eviction | in-cache positions | bfloat16 |
|---|---|---|---|---|
"""


def row(name: str, found: Outcome) -> str:
    """A line of the table."""
    if found.refused:
        cells = [f"refused: {reason(found.refused)}", "", "", ""]
    else:
        full = "exact" if found.exact else f"DIFFERS: tokens equal: {found.tokens}, logits by {found.logits:.1e}"
        eviction = "; ".join(f"{policy}: {fault}" for policy, fault in found.faults.items()) or "within budget"
        turned = "right" if found.turning < 1e-4 else f"WRONG by {found.turning:.1e}"
        in_cache = f"refused: {reason(found.in_cache)}" if found.in_cache else turned
        half = "not tried" if found.half != found.half else "near" if found.half < NEAR else f"off by {found.half:.0%}"
        cells = [full, eviction, in_cache, half]
    return f"| {name} | {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def reason(line: str) -> str:
    """A refusal without its beginning and its way out, which are the same in all."""
    line = line.split("; valid: ")[0].split(". Valid: ")[0]
    for before in ("in-cache positions need queries that are rotated by fixed frequencies; ", "tiny: "):
        line = line.removeprefix(before)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; default: all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the whole table as Markdown")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ARCHITECTURES):
        parser.error(f"{sorted(unknown)[0]}: unknown; valid: {', '.join(ARCHITECTURES)}")
    if arguments.write and arguments.names:
        parser.error("--write: the table has all architectures; give no names with it")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, refused = [], 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # every self-check is made anew
        for name in arguments.names or ARCHITECTURES:
            found = outcome(ARCHITECTURES[name], half=True)
            refused += bool(found.refused)
            rows.append(row(name, found))
            print(rows[-1], flush=True)
    if arguments.write:
        head = HEAD.format(count=len(rows), exact=len(rows) - refused, refused=refused)
        arguments.write.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
