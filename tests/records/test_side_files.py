"""A run goes on from a folder whose kept positions are damaged, cut or missing, on a full disk, and with equal ids."""

import errno
import gc
import json
import os
import re
import weakref
from pathlib import Path
from typing import Any

import pytest

from evals.suites import load_samples
from src.records.files import Table, load_records
from src.report import __main__ as report
from src.retention.store import load_retention
from src.session.samples import prepare
from tests.support.cli import call, folders, lines, longbench_folder, metrics, predictions, row, table


@pytest.fixture
def h2o(base: list[str]) -> list[str]:
    return [*base, "policy=h2o", "budget=40", "limit=4"]


def run(arguments: list[str], code: int = 0) -> Path:
    done = call("run", *arguments)
    assert done.code == code, done.err
    return done.folder


def longbench(root: Path, base: list[str], *more: str) -> list[str]:
    return [*base, "tasks=hotpotqa", f"tasks.data_dir={root}", "limit=null", "policy=h2o", "budget=40", *more]


# --- equal ids ---


def test_rows_that_share_an_id_are_all_counted_and_a_repeat_adds_nothing(base: list[str], tmp_path: Path) -> None:
    rows = [
        row(0, _id="same"),
        row(1, _id="same"),
        row(0, _id="same"),
        row(2, _id="same#2"),
        row(3, _id=7),
        row(4, _id="7"),
    ]
    arguments = longbench(longbench_folder(tmp_path / "data", rows), base)
    folder = run(arguments)
    content = (folder / "predictions.jsonl").read_bytes()
    names = ["same", "same#2", "same#3", "same#2#2", "7", "7#2"]
    assert [line["id"] for line in lines(folder)] == names
    assert metrics(folder)["tasks"]["hotpotqa"]["n"] == metrics(folder)["retention"]["samples"] == 6
    assert run(arguments) == folder and (folder / "predictions.jsonl").read_bytes() == content


def test_names_of_equal_ids_depend_on_earlier_rows_only(tmp_path: Path) -> None:
    rows = [row(i, _id=name) for i, name in enumerate(["x", "x#2", "x", "x", "x#2", None, "5", 6, None])]
    root = longbench_folder(tmp_path / "data", rows)
    every = [s.id for s in load_samples("longbench", ["hotpotqa"], None, str(root), 0)]
    assert every == ["x", "x#2", "x#3", "x#4", "x#2#2", "5", "5#2", "6", "8"]
    for limit in range(1, len(rows)):
        assert [s.id for s in load_samples("longbench", ["hotpotqa"], limit, str(root), 0)] == every[:limit]


def test_malformed_rows_that_share_an_id_are_told_apart_too(base: list[str], tmp_path: Path) -> None:
    broken = json.dumps(row(1, _id="same", input=None))
    rows = [row(0, _id="same"), broken, broken]
    arguments = longbench(longbench_folder(tmp_path / "data", rows), base, "broken_rows=record")
    folder = run(arguments, code=1)
    assert [(line["id"], bool(line["error"])) for line in lines(folder)] == [
        ("same#2", True), ("same#3", True), ("same", False),
    ]  # fmt: skip
    run(arguments, code=1)
    assert len(lines(folder)) == 3


def test_an_id_that_numpy_would_shorten(base: list[str], tmp_path: Path) -> None:
    rows = [row(0, _id="a\0"), row(1, _id="a")]
    arguments = longbench(longbench_folder(tmp_path / "data", rows), base)
    folder = run(arguments)
    run(arguments)
    assert len(lines(folder)) == len(load_retention(folder)) == 2


def test_data_that_changes_to_and_fro_does_not_grow_the_file_for_ever(base: list[str], tmp_path: Path) -> None:
    both = [longbench_folder(tmp_path / name, [row(i, _id="a"), row(9, _id="b")]) for i, name in enumerate("xy")]
    found = []
    for turn in range(9):
        folder = run(longbench(both[turn % 2], base))
        found.append(len(lines(folder)))
        assert [record.answers for record in load_records(folder)] == [[f"name{turn % 2}"], ["name9"]]
        assert metrics(folder)["samples"] == metrics(folder)["retention"]["samples"] == 2
    assert found == [2] + [3] * 8


def test_other_reference_answers_are_scored_anew(base: list[str], tmp_path: Path) -> None:
    """The prompt, and so the sample's key, is the same; the old score would be one against answers of the past."""
    before = longbench_folder(tmp_path / "before", [row(1, answers=["x"]), row(2)])
    folder = run(longbench(before, base, "policy=full"))
    said = {record.id: record.prediction for record in load_records(folder)}
    after = longbench_folder(tmp_path / "after", [row(1, answers=[said["row1"]]), row(2)])
    done = call("run", *longbench(after, base, "policy=full"))
    assert done.code == 0 and "1 finished samples ran again: their reference answers have changed" in done.err
    found = {record.id: record for record in load_records(folder)}
    assert found["row1"].answers == [said["row1"]] and found["row1"].prediction == said["row1"]
    assert len(lines(folder)) == 3 and metrics(folder)["samples"] == 2


def test_a_sample_that_fails_anew_each_time_does_not_grow_the_file_for_ever(
    h2o: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for turn in range(6):

        def never(*_: object, turn: int = turn) -> None:
            raise RuntimeError(f"can't allocate memory: you tried to allocate {turn} bytes")

        monkeypatch.setattr("src.engine.engine.Engine.prefill", never)
        found.append(len(lines(run([*h2o, "limit=1"], code=1))))
    assert found == [1, 2, 1, 2, 1, 2]


# --- one file per sample ---


def test_ids_of_any_kind_have_a_trace_each(base: list[str], tmp_path: Path) -> None:
    ids = ["a/b", "a_b", "a b", "A_B", "x" * 400, "汉" * 100, "..", ""]
    root = longbench_folder(tmp_path / "data", [row(i, _id=name) for i, name in enumerate(ids)])
    folder = run(longbench(root, base, "kept_over_time=2"))
    assert len(list((folder / "kept_over_time").glob("*.npz"))) == len(ids) == len(lines(folder))


# --- kept positions that are not there ---


def test_positions_left_out_before_are_computed_when_asked_for(h2o: list[str]) -> None:
    folder = run([*h2o, "retention=off"])
    assert metrics(folder)["retention"] == {}
    done = call("run", *h2o, "limit=6")
    assert "4 finished samples ran again" in done.err
    assert metrics(folder)["samples"] == metrics(folder)["retention"]["samples"] == 6
    content = (folder / "predictions.jsonl").read_bytes()
    run([*h2o, "limit=6"])
    assert (folder / "predictions.jsonl").read_bytes() == content


def test_counts_in_bins_are_not_enough_for_positions(h2o: list[str]) -> None:
    folder = run([*h2o, "retention=bins"])
    run(h2o)
    assert not any(sample.binned for sample in load_retention(folder))
    run([*h2o, "limit=5", "retention=bins"])  # the other way round they are
    assert len(lines(folder)) == 9 and metrics(folder)["retention"]["only_counts"] == 1


@pytest.mark.parametrize("what", ["one sample", "index", "cut", "gone", "not a file of ours"])
def test_damaged_positions_are_computed_again(h2o: list[str], caplog: pytest.LogCaptureFixture, what: str) -> None:
    folder = run(h2o)
    path, right = folder / "retention.npz", table(folder)
    content, before = path.read_bytes(), predictions(folder)
    middle = content.index(b"generated_000001") - 30
    damaged = {
        "one sample": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
        "index": content[:-30] + b"?" + content[-29:],
        "cut": content[:-400],
        "gone": b"",
        "not a file of ours": b"hello",
    }[what]
    path.write_bytes(damaged) if damaged else path.unlink()
    assert report.main([str(folder)]) == 0
    done = call("run", *h2o)
    assert done.code == 0
    assert ("retention.npz: damaged" in caplog.text) == (what != "gone")
    again = 1 if what == "one sample" else 4
    assert f"{again} finished samples ran again" in done.err and len(lines(folder)) == 4 + again
    assert {r.key[:2]: r.prediction for r in load_records(folder)} == {k: v[0] for k, v in before.items()}
    assert path.read_bytes() == content and table(folder) == right


def test_a_cut_journal_costs_no_sample_its_positions(h2o: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:  # as if killed after the last sample
        patched.setattr("src.session.session.Session._close_all", lambda *_, **__: [])
        folder = run(h2o)
    journal = folder / "retention.part"
    journal.write_bytes(journal.read_bytes()[:-7])
    assert "1 finished samples ran again" in call("run", *h2o).err
    assert metrics(folder)["samples"] == metrics(folder)["retention"]["samples"] == 4


def test_the_report_says_n_where_positions_are_of_fewer_samples(
    h2o: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(h2o)
    folder = run([*h2o, "limit=6", "retention=off"])
    assert metrics(folder)["retention"]["samples"] == 4
    assert report.main([str(folder), "--out", str(tmp_path / "report")]) == 0
    assert "kept positions of 4 samples, scores of 6" in " ".join(capsys.readouterr().out.split())
    head, line = (tmp_path / "report/tables/retention.md").read_text().splitlines()[2:5:2]
    assert "n<br>of scored" in head and "| 4 of 6 |" in line
    run([*h2o, "limit=6"])
    assert report.main([str(folder), "--out", str(tmp_path / "sound")]) == 0
    assert "n<br>of scored" not in (tmp_path / "sound/tables/retention.md").read_text()


def test_the_report_goes_on_without_damaged_positions(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call("sweep", *base, "policies=[full,h2o,snapkv]", "budgets=[40]")
    path = next(folder for name, folder in folders(done.folder).items() if name.startswith("h2o")) / "retention.npz"
    content = path.read_bytes()
    place = content.index(b"prompt_000000.npy") + 30
    path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
    assert report.main([str(done.folder), "--out", str(tmp_path / "report")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "No retention map of h2o at 40" in said and "launch the run's command again" in said
    assert "damaged" in (tmp_path / "report/tables/overlap.md").read_text()


# --- a full disk, at every place of writing ---


def fill(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """The system takes no file whose path matches `pattern`."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if re.search(pattern, os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


PLACES = ("predictions.jsonl", "retention.part", "metrics.json", "settings.json", "config.yaml", "environment.json")


@pytest.mark.parametrize("name", [*PLACES, "retention.npz", "kept_over_time/needle"])
def test_a_full_disk_is_one_line_and_nothing_is_lost(
    h2o: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    traced = [*h2o, "kept_over_time=4"]
    with monkeypatch.context() as patched:
        fill(patched, re.escape(name))
        done = call("run", *traced)
    errors = [line for line in done.err.splitlines() if "done, " not in line]
    assert done.code == 2 and len(errors) == 1 and errors[0].startswith("error: ")
    assert name in errors[0] and "cannot be written (No space left on device)" in errors[0]
    assert not list((tmp_path / "results").rglob("*.npz.part")) + list((tmp_path / "results").rglob("*.json.part"))
    folder = run(traced)
    whole = run([*traced, f"output_root={tmp_path / 'undisturbed'}"])
    assert predictions(folder) == predictions(whole) and table(folder) == table(whole)  # and no line is there twice


def test_figures_do_not_wait_for_a_file_that_finds_no_room(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """retention.npz of one cell: its own metrics.json and all files of the others are written."""
    grid = [*base, "policies=[full,h2o,snapkv]", "budgets=[40]"]
    with monkeypatch.context() as patched:
        fill(patched, r"full-all-.*retention\.npz")
        done = call("sweep", *grid)
    assert done.code == 2 and "full-all-" in done.err.splitlines()[-1]
    found = folders(tmp_path / "results")
    assert len(found) == 3 and all((folder / "metrics.json").exists() for folder in found.values())
    right = {name: table(folder) for name, folder in found.items()}
    assert call("sweep", *grid).code == 0
    assert {name: table(folder) for name, folder in found.items()} == right
    assert all(len(load_retention(folder)) == 2 for folder in found.values())


def test_metrics_of_one_cell_that_find_no_room_cost_no_other(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fill(patched, r"(full-all|h2o-40)-.*metrics\.json")
        done = call("sweep", *base, "policies=[full,h2o,snapkv]", "budgets=[40]")
    assert done.code == 2 and "and 1 more cells could not be finished" in done.err
    there = [name.split("-")[0] for name, f in folders(tmp_path / "results").items() if (f / "metrics.json").exists()]
    assert there == ["snapkv"]


def test_no_picture_comes_before_the_last_figures(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grid = [*base, "policies=[full,h2o]", "budgets=[40]"]
    there: list[int] = []

    def full(*_: object) -> None:
        there.append(len(list((tmp_path / "results").rglob("metrics.json"))))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("src.records.folder.plot_retention", full)
        done = call("sweep", *grid)
    assert done.code == 0 and there == [2, 2] and "retention.png: cannot be written (No space" in caplog.text
    assert not list((tmp_path / "results").rglob("*.png"))
    assert call("sweep", *grid).code == 0 and len(list((tmp_path / "results").rglob("*.png"))) == 2


# --- growth ---


def test_malformed_rows_cost_the_same_each(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    current = Table.current

    def counted(self: Table) -> Any:
        nonlocal calls
        calls += 1
        return current(self)

    monkeypatch.setattr(Table, "current", counted)
    found = []
    for count in (2, 40):
        rows = [row(0), *(json.dumps(row(i, input=None)) for i in range(1, count))]
        root = longbench_folder(tmp_path / str(count), rows)
        calls = 0
        run(longbench(root, base, "broken_rows=record", f"output_root={tmp_path / f'out{count}'}"), code=1)
        found.append(calls)
    assert found[0] == found[1]


def test_prompts_are_freed_after_use(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    alive: list[int] = []

    class Ids(list[int]):
        """A list that can be referred to weakly."""

    def prepared(*arguments: Any) -> Any:
        one = prepare(*arguments)
        object.__setattr__(one, "ids", Ids(one.ids))
        gc.collect()
        made.append(weakref.ref(one.ids))
        alive.append(sum(ref() is not None for ref in made))
        return one

    monkeypatch.setattr("src.session.session.prepare", prepared)
    assert call("run", *base, "policy=h2o", "budget=40", "limit=12", "lanes=2").code == 0
    assert len(alive) == 12 and max(alive) <= 4  # a wave of two, and the one that did not fit
