"""kill -9 at any moment: the same command goes on, and in the end nothing is missing, double or different."""

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from src.retention.trace import Trace, trace_path
from tests.support.cli import call, count_lines, folders, lines, metrics, predictions, start, table, wait_for_lines

KILLED = -9


def kill_after(arguments: list[str], entry: str, root: Path, count: int, delay: float, log: Path) -> int | None:
    """Start it, wait until there are `count` lines and `delay` seconds more, and kill -9."""
    process = start(entry, *arguments, log=log)
    wait_for_lines(root, count, process)
    time.sleep(delay)
    process.kill()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("seed", [0, 1])
def test_run_killed_then_extended(base: list[str], tmp_path: Path, seed: int) -> None:
    """Killed, killed again, then run with a larger limit and more tasks."""
    moments = random.Random(seed)
    small = [*base, "policy=h2o", "budget=40", "limit=6", "max_new_tokens=80", "lanes=2"]
    root = tmp_path / "results"
    done = 0
    for _ in range(2):
        count = min(done + moments.randint(0, 2), 4)
        code = kill_after(small, "run", root, count, moments.random() * 0.05, tmp_path / "log")
        assert code == KILLED, (tmp_path / "log").read_text()
        done = sum(count_lines(path) for path in root.rglob("predictions.jsonl"))
    large = [*small, "limit=7", "tasks.names=[needle,few_shot]"]
    resumed = call("run", *large)
    undisturbed = call("run", *large, f"output_root={tmp_path / 'undisturbed'}")
    assert (resumed.code, undisturbed.code) == (0, 0), resumed.err
    assert resumed.folder.name == undisturbed.folder.name
    assert predictions(resumed.folder) == predictions(undisturbed.folder) and len(lines(resumed.folder)) == 14
    assert table(resumed.folder) == table(undisturbed.folder)


def test_sweep_killed_many_times(base: list[str], tmp_path: Path) -> None:
    """Five times, or as often as KILLS says (20 before a release: `KILLS=20 pytest tests/commands/test_resume.py`)."""
    kills = int(os.environ.get("KILLS", "5"))
    moments = random.Random(0)
    root = tmp_path / "results"
    grid = ["policies=[full,h2o,streaming_llm,ahakv]", "budgets=[40]", "max_lanes=8"]
    arguments = [*base, *grid, "limit=10", "max_new_tokens=60", "fidelity=true", "kept_over_time=20"]
    total = 4 * 10
    for i in range(1, kills + 1):
        count = max(i * total // (kills + 1) - moments.randint(0, 3), 0)
        code = kill_after(arguments, "sweep", root, count, moments.random() * 0.04, tmp_path / "log")
        assert code == KILLED, (tmp_path / "log").read_text()
    assert not list(root.rglob("metrics.json"))  # never came to an end
    resumed = call("sweep", *arguments)
    undisturbed = call("sweep", *arguments, f"output_root={tmp_path / 'undisturbed'}")
    assert (resumed.code, undisturbed.code) == (0, 0), resumed.err
    ours, theirs = folders(resumed.folder), folders(undisturbed.folder)
    assert sorted(ours) == sorted(theirs) and len(ours) == 4
    for name in ours:
        assert predictions(ours[name]) == predictions(theirs[name]) and len(lines(ours[name])) == 10
        assert table(ours[name]) == table(theirs[name])
        for record in lines(ours[name]):
            both = [Trace.load(trace_path(run[name], record["task"], record["id"])) for run in (ours, theirs)]
            assert both[0].steps == both[1].steps and np.array_equal(both[0].shares, both[1].shares)
        assert not list((ours[name] / "kept_over_time").glob("*.part"))


def test_torn_last_line_is_repaired(base: list[str], caplog: pytest.LogCaptureFixture) -> None:
    arguments = [*base, "policy=h2o", "budget=40", "limit=3"]
    first = call("run", *arguments)
    before, path = predictions(first.folder), first.folder / "predictions.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    again = call("run", *arguments)
    assert again.code == 0 and predictions(again.folder) == before
    assert any("unfinished last line" in r.message and str(path) in r.message for r in caplog.records)
    assert path.read_bytes().splitlines()[:2] == content.splitlines()[:2]  # nothing else ran again


def test_finished_folder_recomputes_nothing(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*base, "policy=h2o", "budget=40"]
    first = call("run", *arguments)
    content = (first.folder / "predictions.jsonl").read_bytes()
    (first.folder / "metrics.json").unlink()

    def never(*_: object) -> None:
        raise AssertionError("a prompt was read again")

    monkeypatch.setattr("src.engine.engine.Engine.prefill", never)
    again = call("run", *arguments)
    assert again.code == 0 and again.folder == first.folder
    assert (first.folder / "predictions.jsonl").read_bytes() == content and metrics(first.folder)["samples"] == 2


def test_two_processes_cannot_share_a_folder(base: list[str], tmp_path: Path) -> None:
    arguments = [*base, "policy=h2o", "budget=40", "limit=40", "lanes=1", "max_new_tokens=100"]
    process = start("run", *arguments, log=tmp_path / "log")
    wait_for_lines(tmp_path / "results", 1, process)
    second = call("run", *arguments)
    process.kill()
    process.join(60)
    assert second.code == 2 and "another process" in second.err and len(second.err.splitlines()) == 1
