"""python -m src.study DIR... --out results/study/NAME --command "..." : small tables worth committing.

A DIR is a run's folder or any folder above some. Written to --out, one line per thing measured:

    cells.csv        model, policy, options, budget, task ("all": mean over tasks), n, failed, prompt_tokens,
                     score, nll, kl, top1, output_error each with _low and _high, stderr (of the score), kv_bytes,
                     kv_bytes_peak, kv_bytes_full, bookkeeping_bytes (means per sample), and where a policy has
                     them kv_bytes_device, codebook_bytes, chosen_share (of the tokens, per step)
    retention.csv    model, policy, options, budget, part ("all" kept entries; the "heavy" ones, without the recent
                     window that all heads kept; the "chosen" ones of a policy that keeps all and chooses), measure
                     (decile_01 .. decile_10: share of the entries in each tenth of the prompt; mean_position;
                     first_to_last: decile_01 / decile_10; drift: share of the kept entries that were gone at the end;
                     needle: share of the sentence that holds the answer, needle_end: of it at the end; score_slope:
                     of ln(score) against ln(position) and score_slope_theory: the same for exchangeable logits), n,
                     value, low, high
    octaves.csv      model, policy, options, budget, first (position, from 1, of the octave 1, 2-3, 4-7, ...), n, value,
                     low, high: the policy's score there relative to its mean, means over layers and KV heads
    differences.csv  model, policy, options, budget, against, measure (score, kl, nll), n, difference, low, high,
                     p, p_holm: paired on the samples, at equal budget
    README.md        the command that made the runs, the one that made these files, and what else one must know

`options` are those that differ from conf/policy. Intervals are 95 % bootstrap intervals over samples
(src/compare/intervals.py); of retention over samples of all tasks alike, of everything else of the mean over tasks.
The notebooks read these files when there are no run folders.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.arguments import OneLineParser
from evals.visible import csv_cell, one_line, visible
from src.compare.intervals import RESAMPLES, check_resamples
from src.errors import InputError
from src.logs import log_to_stderr


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m src.study", InputError, "Small tables of finished runs, to be committed.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's folder, or a folder above some")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="e.g. results/study/bias_study")
    parser.add_argument("--command", action="append", required=True, help="what made the runs; may be repeated")
    parser.add_argument("--baseline", help="what differences are against, at equal budget (default: the full cache)")
    parser.add_argument("--min-prompt", type=int, default=0, metavar="N", help="leave out samples with shorter prompts")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"bootstrap resamples ({RESAMPLES})")
    log_to_stderr()
    try:
        given = parser.parse_args(argv)
        check_resamples(given.resamples)
        from src.study.collect import collect, readme  # torch, pandas: not for a wrong argument

        tables, study = collect(given.folders, given.baseline, given.min_prompt, given.resamples)
        own = shlex.join(["python", "-m", "src.study", *(sys.argv[1:] if argv is None else argv)])
        given.out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            plain = table.rename(columns=csv_cell).map(csv_cell)  # names come from folders that may be foreign
            plain.to_csv(given.out / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
        (given.out / "README.md").write_text(readme(study, given.command, own, given.out.name), encoding="utf-8")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {one_line(f'--out {given.out}: cannot be written ({error.strerror})')}", file=sys.stderr)
        return 2
    print(f"study: {visible(str(given.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
