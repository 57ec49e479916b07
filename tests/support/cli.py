"""Run the entry points as a user does: in this process, or in one of their own that can be killed."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra._internal.hydra import Hydra

from src import calibrate, run, sweep
from src.bench import __main__ as bench
from src.config import main as settings

ROOT = Path(__file__).resolve().parents[2]
ENTRY: dict[str, Any] = {"run": ("config", run.run), "sweep": ("sweep", sweep.sweep)}
ENTRY |= {"bench": ("bench", bench.bench), "calibrate": ("calibrate", calibrate.make)}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """What the last line on stdout names."""
        last = self.out.splitlines()[-1]
        assert last.startswith("results: "), self.out + self.err
        return Path(last.removeprefix("results: "))


def call(entry: str, *arguments: str) -> Result:
    """`python -m src.<entry> ...` within this process (torch on one thread: two would fight on a small machine).

    Hydra composes everything once only to read `hydra.mode`; without these words nothing says it, and it answers None.
    """
    asked = any(re.search(r"hydra|cluster=|config-|experiment=|^-", argument) for argument in arguments)
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.object(sys, "argv", [f"src/{entry}.py", *arguments]),
            contextlib.nullcontext() if asked else mock.patch.object(Hydra, "get_mode", return_value=None),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = settings.main(*ENTRY[entry])
    except SystemExit as end:  # Hydra's way out of --help and --cfg
        code = int(end.code or 0)
    finally:
        torch.set_num_threads(threads)
    return Result(code, out.getvalue(), err.getvalue())


def start(entry: str, *arguments: str, log: Path) -> BaseProcess:
    """The same in a process of its own, forked from one that has imported everything already: it starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["src.run", "src.sweep", "src.session.session"])
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}):
        process = context.Process(target=_child, args=(entry, arguments, str(log)))
        process.start()
    return process


def _child(entry: str, arguments: tuple[str, ...], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [f"src/{entry}.py", *arguments]
    torch.set_num_threads(1)
    sys.exit(settings.main(*ENTRY[entry]))


def wait_for_lines(root: Path, count: int, process: BaseProcess, seconds: float = 60) -> None:
    """Until all predictions.jsonl below `root` have so many lines together, or the process has ended."""
    end = time.monotonic() + seconds
    while sum(map(count_lines, root.rglob("predictions.jsonl"))) < count and process.is_alive():
        assert time.monotonic() < end, f"fewer than {count} lines after {seconds} s"
        time.sleep(0.001)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def lines(folder: Path) -> list[dict[str, Any]]:
    """Every line of predictions.jsonl, in the order written."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def predictions(folder: Path) -> dict[tuple[str, str], Any]:
    """(task, id) -> what a sample came to, times left out; a sample that is there twice is an error."""
    found = {}
    for line in lines(folder):
        key = line["task"], line["id"]
        assert key not in found, f"{key} is in {folder} twice"
        found[key] = [line[name] for name in ("prediction", "score", "prompt_hash", "kept", "kv_bytes", "finish")]
    return found


def metrics(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return loaded


def table(folder: Path) -> dict[str, Any]:
    """metrics.json without what depends on the clock and on the process."""
    figures = metrics(folder)
    figures.pop("speed")
    figures["memory"] = {name: v for name, v in figures["memory"].items() if not name.startswith("peak")}
    return figures


def folders(root: Path) -> dict[str, Path]:
    """Name -> every run folder below `root`."""
    return {path.parent.name: path.parent for path in sorted(root.rglob("predictions.jsonl"))}


@contextlib.contextmanager
def unchanged(root: Path) -> Iterator[None]:
    """No file below `root` is added, removed or changed meanwhile."""

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    before = content()
    yield
    assert content() == before


def longbench_folder(root: Path, rows: list[Any], prompt: str = "Text: {context}\nQuestion: {input}\nAnswer:") -> Path:
    """A folder for `tasks.data_dir` with these rows of hotpotqa (text is written as it is)."""
    (root / "data").mkdir(parents=True)
    (root / "config").mkdir()
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    (root / "data" / "hotpotqa.jsonl").write_text(text, encoding="utf-8")
    (root / "config" / "dataset2prompt.json").write_text(json.dumps({"hotpotqa": prompt}), encoding="utf-8")
    (root / "config" / "dataset2maxlen.json").write_text(json.dumps({"hotpotqa": 6}), encoding="utf-8")
    return root


def row(number: int, **changes: Any) -> dict[str, Any]:
    """One LongBench row; None removes a field."""
    full = {
        "_id": f"row{number}",
        "input": f"who is number {number}?",
        "context": f"Number {number} is called name{number}. " * 8,
        "answers": [f"name{number}"],
        "all_classes": None,
        "length": 40,
    }
    return {name: value for name, value in {**full, **changes}.items() if value is not None or name == "all_classes"}
