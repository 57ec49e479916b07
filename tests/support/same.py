"""Does another revision give the same numbers?   make same BASE=main~1   (python -m tests.support.same BASE)

What a refactor must prove before anything is built on it. A fixed grid runs twice, in this work tree and in a
checkout of BASE, through the command line only, so that it does not matter how either is built: every policy of
conf/policy on a tiny model (pocket tasks; rows with `fidelity`, `prompt_scope=context` and `kept_over_time`), and
three policies on the embedded model. Then it compares folder names, predictions, kept positions, metrics and report
tables. Left out: what a clock or an allocator decides. A field that only one side has is named, but is no difference.

With --renamed the folders' hashes may differ (a setting was added to what changes an outcome).

Exit code 0: the same, 1: something differs (each difference on a line), 2: a command failed.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "longbench"
# What depends on the clock, the allocator, or stands for the line itself.
CLOCK = (
    "seconds",
    "per_second",
    "peak_bytes",
    "peak_prefill_bytes",
    "peak_decode_bytes",
    "check",
    "digest",
    "schema_version",
)
SKIPPED = ("report", "wandb", ".multirun")
TASKS = "[needle,kv_lookup,few_shot]"


def main(arguments: list[str]) -> int:
    renamed = "--renamed" in arguments
    arguments = [argument for argument in arguments if argument != "--renamed"]
    if len(arguments) != 1:
        print(
            "usage: python -m tests.support.same BASE [--renamed]; BASE: a git revision or a checkout", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="same-") as scratch:
        work = Path(scratch)
        base, checkout = Path(arguments[0]), work / "checkout"
        if not base.is_dir():
            base = checkout
            git("worktree", "add", "--detach", "--quiet", str(base), arguments[0])
        try:
            inputs = make_inputs(work / "inputs")
            for name, tree in (("base", base), ("here", ROOT)):
                for command in commands(work / "inputs", policies(base, ROOT), inputs):
                    run(tree, work / name, command)
        except subprocess.CalledProcessError as error:
            print(f"error: {' '.join(error.cmd)}: exit code {error.returncode}", file=sys.stderr)
            return 2
        finally:
            if base == checkout:
                git("worktree", "remove", "--force", str(base))
        found = list(differences(work / "base", work / "here", renamed))
    for line in found:
        print(line)
    print(f"{len(found)} differences" if found else "the same")
    return 1 if found else 0


def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True)


def policies(*trees: Path) -> list[str]:
    """Names that every tree has."""
    return sorted(set.intersection(*({p.stem for p in (t / "conf" / "policy").glob("*.yaml")} for t in trees)))


def make_inputs(folder: Path) -> dict[str, str]:
    """A tiny model, and rows of a benchmark (real ones where this machine has them)."""
    from tests.support.cli import longbench_folder, row
    from tests.support.tiny import tiny, tiny_tokenizer

    tiny("llama", eos_token_id=1).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    if SHARED.is_dir():
        return {"data": str(SHARED), "tasks": "longbench", "names": "[hotpotqa,trec,gov_report,lcc,passage_count]"}
    longbench_folder(folder / "rows", [row(number) for number in range(4)])
    return {"data": str(folder / "rows"), "tasks": "hotpotqa", "names": "[hotpotqa]"}


def commands(inputs: Path, names: list[str], rows: Mapping[str, str]) -> Iterator[list[str]]:
    """Of one side, in order: grids on the tiny model, single runs, the embedded model, reports."""
    # Each side fits codebooks of its own, and both run with the base's: their path is part of the settings.
    fitted, codebooks = "codebooks.safetensors", "../base/codebooks.safetensors"
    model = ["model=local", f"model.path={inputs / 'tiny'}", "model.max_prompt_tokens=360", "wandb.mode=disabled"]
    fit = ["groups=4", "centroids=16", "samples=1", "sample_tokens=256", "jobs=1", f"output={fitted}"]
    yield ["src.calibrate|src.codebooks", *model[:2], *fit]
    needs = {  # beside their defaults, for a tiny model and a small budget
        "hcattention": f"groups: 4, centroids: 16, codebooks: {codebooks}",
        "kivi": "store: {group: 8, residual: 8}",
        "duo_attention": "allocate: {sinks: 4, recent: 20}",
    }
    cells = ",".join(f"{{name: {name}, {needs[name]}}}" if name in needs else name for name in names)
    grid = [*model, f"policies=[{cells}]", "max_new_tokens=24"]
    yield [
        *("src.sweep", *grid, "budgets=[48,0.3]", f"tasks.names={TASKS}", "limit=2", "kept_over_time=4"),
        *("fidelity=true", "output_root=pocket"),
    ]
    bench = [f"tasks={rows['tasks']}", f"tasks.data_dir={rows['data']}", f"tasks.names={rows['names']}", "limit=1"]
    yield ["src.sweep", *grid, "budgets=[64]", *bench, "fidelity=true", "output_root=rows"]
    yield [
        *("src.sweep", *grid, "budgets=[64]", *bench, "prompt_scope=context", "retention=bins"),
        "output_root=context",
    ]
    single = [*model, *bench, "max_new_tokens=24", "output_root=single"]
    yield ["src.run", "policy=snapkv", "policy.kernel=3", "budget=0.2", "lanes=3", *single]
    yield ["src.run", "policy=ahakv", "policy.score_pool=7", "budget=40", *single]
    yield [
        *("src.sweep", "wandb.mode=disabled", "policies=[full,h2o,snapkv]", "budgets=[128]"),
        *(f"tasks.names={TASKS}", "limit=1", "output_root=embedded"),
    ]
    for name in ("pocket", "rows", "context", "embedded"):
        yield ["src.report", name, "--resamples", "1000"]


def run(tree: Path, out: Path, command: list[str]) -> None:
    """`python -m` the first module of the alternatives that the tree has."""
    modules, *arguments = command
    out.mkdir(exist_ok=True)
    module = next(m for m in modules.split("|") if (tree / f"{m.replace('.', '/')}.py").exists()
                  or (tree / m.replace(".", "/")).is_dir())  # fmt: skip
    print(f"{out.name}: {module} {' '.join(a for a in arguments if '=' in a)[:100]}", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}
    environment.setdefault("OMP_NUM_THREADS", "1")  # sums in one order
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=out, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
        done.check_returncode()


def differences(base: Path, here: Path, renamed: bool = False) -> Iterator[str]:
    """A line for everything that is not the same, and to stderr the fields that only one side has."""
    files = [files_of(side, renamed) for side in (base, here)]
    for name in sorted(set(files[0]) ^ set(files[1])):
        yield f"{name}: only {'at the base' if name in files[0] else 'here'}"
    extra: set[str] = set()
    for name in sorted(set(files[0]) & set(files[1])):
        read = READERS[files[0][name].suffix]
        yield from unlike(name, read(files[0][name]), read(files[1][name]), extra)
    for name in sorted(extra):
        print(f"on one side only: {name}", file=sys.stderr)


def files_of(side: Path, renamed: bool) -> dict[str, Path]:
    """What is compared: name -> file. Where folders were renamed, their hash is left out of the name."""
    paths = [path for path in sorted(side.rglob("*")) if wanted(path.relative_to(side))]
    names = [str(path.relative_to(side)) for path in paths]
    if renamed:
        names = [re.sub(r"-[0-9a-f]{8}(?=/)", "", name) for name in names]
    assert len(set(names)) == len(names), "folders that differ in their hash only"
    return dict(zip(names, paths, strict=True))


def wanted(path: Path) -> bool:
    if path.suffix == ".csv":
        return "tables" in path.parts
    return path.suffix in (".jsonl", ".npz", ".safetensors") or (
        path.name == "metrics.json" and not set(SKIPPED) & set(path.parts)
    )


def lines(path: Path) -> Any:
    """By task and id: in which order lanes finish is nobody's promise."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {f"{record['task']} {record['id']}": record for record in records}


def whole(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def arrays(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name].tolist() for name in found.files}


def tensors(path: Path) -> Any:
    return {name: tensor.tolist() for name, tensor in load_file(path).items()}


def rows_of(path: Path) -> Any:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


READERS = {".jsonl": lines, ".json": whole, ".npz": arrays, ".csv": rows_of, ".safetensors": tensors}


def unlike(where: str, base: Any, here: Any, extra: set[str]) -> Iterator[str]:
    if isinstance(base, dict) and isinstance(here, dict):
        for key in [*base, *(k for k in here if k not in base)]:
            if any(str(key).endswith(name) for name in CLOCK):
                continue
            if key in base and key in here:
                yield from unlike(f"{where}: {key}", base[key], here[key], extra)
            else:
                extra.add(f"{Path(where.partition(':')[0]).name}: {key} ({'base' if key in base else 'here'})")
    elif (
        isinstance(base, list)
        and isinstance(here, list)
        and len(base) == len(here)
        and base
        and isinstance(base[0], dict)
    ):
        for number, (one, other) in enumerate(zip(base, here, strict=True)):
            yield from unlike(f"{where}[{number}]", one, other, extra)
    elif base != here and not (base != base and here != here):  # NaN is NaN
        yield f"{where}: {str(base)[:80]} at the base, {str(here)[:80]} here"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
