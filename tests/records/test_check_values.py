"""Check values: no changed byte of a run's files reaches a table, and files of before are read with one warning."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.compare.analysis import analyse
from src.compare.matched import Study, make_study
from src.errors import InputError
from src.records.files import load_records
from src.records.folder import RunFolder
from src.records.predictions import parse
from src.records.record import Record
from src.records.seal import as_json, sealed
from src.report.__main__ import main
from src.report.formats import comma_separated
from src.report.tables import make_tables, memory_table
from tests.support.synthetic_runs import record, write_run

PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"


def lines(*scores: float | None, budget: float = 64, **more: Any) -> list[dict[str, Any]]:
    return [record("qasper", i, score, budget, **more) for i, score in enumerate(scores)]


def tables(study: Study) -> list[str]:
    return [comma_separated(table) for table in make_tables(analyse(study, resamples=1000))]


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def without_checks(folder: Path) -> None:
    """The folder as it would have been before there were check values."""
    for name in (PREDICTIONS, METRICS, "environment.json"):
        path = folder / name
        path.write_text(re.sub(r',\s*"check": "[0-9a-f]{8}"', "", path.read_text()))
    change(folder / METRICS, '"settings_hash"', '"other"')


# --- lines ---


def test_every_changed_bit_of_a_line_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / PREDICTIONS
    sound = Record.of(record("qasper", 1, 12.5, 64, prediction="a – b", fidelity={"kl": 0.25}))
    line, other = sound.line(), Record.of(record("qasper", 2, 50, 64)).line()
    path.write_bytes(line + other)
    assert parse(path).records[0] == sound and not parse(path).damaged
    for place in range(len(line) - 1):
        for bit in range(8):
            changed = bytearray(line)
            changed[place] ^= 1 << bit
            path.write_bytes(bytes(changed) + other)
            assert all(found == sound for found in parse(path).records if found.id != "qasper-002"), (place, bit)


def test_a_line_that_fails_is_dropped_said_and_the_file_made_sound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path, records=lines(10, 20, 30, 40))
    path = folder / PREDICTIONS
    whole = path.read_bytes().splitlines(keepends=True)
    for number, place in enumerate((2, 4)):
        changed = [*whole]
        changed[place - 1] = changed[place - 1].replace(b'"kv_bytes": 393216', b'"kv_bytes": 393217')
        assert changed != whole
        path.write_bytes(b"".join(changed))
        assert len(load_records(folder)) == 3
        (note,) = [w for w in make_study([tmp_path]).warnings if f"{PREDICTIONS}:{place}: damaged" in w]
        assert "launch the run again" in note
        caplog.clear()
        settings = json.loads((folder / "settings.json").read_text())
        with caplog.at_level(logging.WARNING), RunFolder(folder, settings) as run:
            assert len(run.records) == 3
            assert not run.done(("qasper", f"qasper-00{place - 1}", lines(0, 0, 0, 0)[place - 1]["prompt_hash"]))
        assert f"{PREDICTIONS}:{place}: damaged" in caplog.text and number < 2
        assert path.read_bytes() == b"".join(line for line in whole if line != whole[place - 1])
        path.write_bytes(b"".join(whole))


def test_a_line_that_lost_its_check_is_no_line_of_before(tmp_path: Path) -> None:
    folder = write_run(tmp_path, records=lines(10, 20))
    path = folder / PREDICTIONS
    first, second = path.read_text().splitlines()
    stripped = {name: value for name, value in json.loads(first).items() if name != "check"}
    path.write_text(json.dumps({**stripped, "score": 99.0}) + f"\n{second}\n")
    assert [r.score for r in load_records(folder)] == [20]
    path.write_text(json.dumps({**stripped, "score": 99.0}) + "\n")  # alone; metrics.json has a check and knows
    with pytest.raises(InputError, match=r"predictions\.jsonl:1: damaged \(its check value is gone\)"):
        make_study([tmp_path])


def test_folders_of_before_are_read_with_one_warning_and_sealed_when_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sound = write_run(tmp_path / "a", records=lines(10, 20, 30))
    expected = tables(make_study([sound]))
    without_checks(sound)
    study = make_study([sound])
    assert tables(study) == expected
    (warning,) = study.warnings
    assert sound.name in warning and "check values" in warning
    settings = json.loads((sound / "settings.json").read_text())
    with caplog.at_level(logging.WARNING), RunFolder(sound, settings) as run:
        assert len(run.records) == 3
    (message,) = [r.message for r in caplog.records if PREDICTIONS in r.message]
    assert "before" in message and parse(sound / PREDICTIONS).before is False
    caplog.clear()
    with caplog.at_level(logging.WARNING), RunFolder(sound, settings):
        assert not caplog.records


# --- the other files ---


def test_scores_and_sizes_are_computed_from_the_lines(tmp_path: Path) -> None:
    folder = write_run(tmp_path, records=lines(10, 20, 30))
    path = folder / METRICS
    expected = tables(make_study([tmp_path]))
    changed = json.loads(path.read_text())
    changed["memory"]["kv_bytes_mean"] *= 2
    changed["memory"]["ratio"] = 0.99
    path.write_text(json.dumps(changed))
    study = make_study([tmp_path])
    assert tables(study) == expected and any("memory kv_bytes_mean" in w for w in study.warnings)
    entries = changed["memory"]["kv_bytes_mean"] / 2  # as the lines say
    assert memory_table(analyse(study, 1000)).rows[0][2].value == pytest.approx(entries / 2**20)


@pytest.mark.parametrize("old, new", [('"policy": "snapkv"', '"policy": "snapkw"'), ('"budget": 64', '"budget": 65')])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", [METRICS, "settings.json"])
def test_a_cell_is_what_its_folder_says(tmp_path: Path, old: str, new: str, before: bool, name: str) -> None:
    write_run(tmp_path, "h2o", records=lines(1, 2))
    folder = write_run(tmp_path, records=lines(10, 20))
    if before:
        without_checks(folder)
    change(folder / name, old if name == METRICS else old.replace("policy", "name"), new)
    study = make_study([tmp_path])
    assert [run.policy for run in study.runs] == ["h2o"]
    assert any("left out" in w and folder.name in w for w in study.warnings)
    with pytest.raises(InputError, match=folder.name):
        make_study([folder])


def test_damaged_metrics_are_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(tmp_path, records=lines(10, 20))
    path = folder / METRICS
    sound = path.read_text()
    change(path, '"average": 15', '"average": 95')
    with pytest.raises(InputError, match=r"metrics\.json: changed since it was written.*launch the run again"):
        make_study([tmp_path])
    write_run(tmp_path, records=())
    assert path.read_text() == sound and "metrics.json: damaged" in caplog.text


def test_settings_are_mended_where_the_metrics_know_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(tmp_path, records=lines(10, 20), options={"window": 32})
    path = folder / "settings.json"
    sound = path.read_text()
    for damaged in (sound.replace("32", "33"), sound[:40], "", "[1]", "[" * 5000):
        path.write_text(damaged)
        with RunFolder(folder, json.loads(sound)):
            assert path.read_text() == sound
        assert "settings.json: damaged" in caplog.text
        caplog.clear()
    with pytest.raises(InputError, match="other settings"):  # sound, but not of this command
        RunFolder(folder, {**json.loads(sound), "seed": 1})


def test_a_damaged_environment_is_not_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path, records=lines(10, 20))
    change(folder / "environment.json", "2.13.0", "2.12.0")
    study = make_study([tmp_path])
    assert study.runs[0].environment == {} and any("environment.json is damaged" in w for w in study.warnings)


# --- values of another type ---

LINE = {
    **{f"score {value!r}": {"score": value} for value in ("50", [1], True, {"a": 1}, -1, 100.5, 1e9, 10**400)},
    **{f"error {value!r}": {"error": value} for value in (1, [], {"a": 1}, True)},
    **{f"fidelity {value!r}": {"fidelity": value} for value in ("x", [1], 3, {"kl": "x"}, {"kl": {"a": 1}})},
    **{f"kv_bytes {value!r}": {"kv_bytes": value} for value in ("1", [1], -5, True, 10**30)},
    **{f"answers {value!r}": {"answers": value} for value in ("x", [1], {"a": 1})},
    **{f"extra {value!r}": {"extra_scores": value} for value in ("x", [1], {"a": "b"})},
    **{f"{name} {value!r}": {name: value} for name in ("task", "id", "prompt_hash") for value in (None, 1, [], {})},
    "truncated": {"truncated": "yes"},
    "finish": {"finish": 3},
    "prediction": {"prediction": ["x"]},
    "metric": {"metric": 1},
    "surrogate task": {"task": "a\ud800"},
    "long task": {"task": "a" * 300},
    "empty task": {"task": ""},
}
RAW = {
    "NaN": ('"score": 20', '"score": NaN'),
    "Infinity": ('"score": 20', '"score": Infinity'),
    "beyond a double": ('"score": 20', '"score": 1e999'),
    "thousands of digits": ('"score": 20', f'"score": {"9" * 5000}'),
    "NaN elsewhere": ('"length": 400', '"length": NaN'),
    "nested deeply": ('"length": 400', f'"length": {"[" * 5000}{"]" * 5000}'),
    "not UTF-8": ('"score": 20', '"score": 20\udcff'),
}


def reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `python -m src.report` says on a run: its notes, or its one line of error."""
    code = main([str(folder), "--resamples", "1000", "--samples", "1"])
    shown = capsys.readouterr()
    assert code in (0, 2) and "Traceback" not in shown.err and len(shown.err.splitlines()) == (code == 2)
    return shown.out + shown.err


@pytest.mark.parametrize("name", LINE)
@pytest.mark.parametrize("before", [False, True], ids=["sealed", "of before"])
def test_a_line_with_another_type_is_no_record(tmp_path: Path, name: str, before: bool) -> None:
    """Whether or not its check value fits: somebody may have written it so."""
    folder = write_run(tmp_path, records=lines(10, 20, 30))
    if before:
        without_checks(folder)
    path = folder / PREDICTIONS
    kept = path.read_text().splitlines()
    bad = {**lines(10, 20, 30)[1], **LINE[name]}
    kept[1] = json.dumps(bad) if before else as_json(sealed(bad))
    path.write_text("\n".join(kept) + "\n")
    study = make_study([tmp_path])
    assert study.scored == 2 and any(f"{PREDICTIONS}:2: damaged" in w for w in study.warnings)
    tables(study)


@pytest.mark.parametrize("name", RAW)
def test_a_line_that_is_no_sound_json_is_no_record(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path, records=lines(10, 20, 30))
    without_checks(folder)
    path = folder / PREDICTIONS
    old, new = RAW[name]
    text = path.read_text()
    assert old in text
    first, second, third = text.splitlines()
    path.write_text("\n".join([first, second.replace(old, new, 1), third, ""]), errors="surrogateescape")
    assert f"{PREDICTIONS}:2: damaged" in reported(folder, capsys)


Change = Callable[[dict[str, Any]], Any]


def put(*names: str, value: Any) -> Change:
    def change(metrics: dict[str, Any]) -> Any:
        inner = metrics
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = value
        return metrics

    return change


ODD = ("x", [1], 3, True, [["a"]])
WRONG: dict[str, Change] = {
    **{
        f"{part} {value!r}": put(part, value=value)
        for part in (
            "policy",
            "model",
            "tasks",
            "memory",
            "retention",
            "comparability",
            "missing",
            "average",
            "samples",
        )
        for value in ODD
        if not (part in ("policy", "model") and value == "x") and not (part in ("average", "samples") and value == 3)
    },
    **{f"budget {value!r}": put("budget", value=value) for value in ("64", [64], True, -1, 0, 10**400, {"a": 1})},
    **{f"task {value!r}": put("tasks", "qasper", value=value) for value in ODD},
    **{f"heavy {value!r}": put("retention", "heavy", value=value) for value in ODD},
    **{f"shares {value!r}": put("retention", "decile_shares", value=value) for value in ODD},
    **{f"gini {value!r}": put("retention", "gini", value=value) for value in ("x", [1], True)},
    "needle": put("retention", "needle", value={"a": 1}),
    "slope": put("retention", "score_slope", value={"mean": "x", "theory": None}),
    "long policy": put("policy", value="p" * 300),
    "surrogate policy": put("policy", value="p\ud800"),
    "surrogate model": put("model", value="\udfff"),
    "a list": lambda metrics: [metrics],
    "deep": put("comparability", "x", value=json.loads("[" * 300 + "]" * 300)),
}


@pytest.mark.parametrize("name", WRONG)
def test_metrics_of_another_type_leave_the_run_out(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, "h2o", records=lines(1, 2))
    folder = write_run(tmp_path, records=lines(10, 20))
    without_checks(folder)
    path = folder / METRICS
    path.write_text(json.dumps(WRONG[name](json.loads(path.read_text()))))
    assert f"{folder.name}" in reported(folder, capsys)
    study = make_study([tmp_path])
    assert [run.policy for run in study.runs] == ["h2o"], study.warnings
    assert any("left out" in w and str(path) in w for w in study.warnings)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 5000])
def test_metrics_that_are_no_sound_json_are_one_line(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path, records=lines(10, 20))
    without_checks(folder)
    change(folder / METRICS, '"average": 15.0', f'"average": {text}')
    assert "error: " in reported(folder, capsys)


def test_names_that_no_picture_can_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options, environment and answers may hold half of a surrogate pair, and a policy may be called anything."""
    odd = "\ud800x"
    for policy in ("snapkv", "../../conf/policy/h2o", "a/b", "x" * 199):
        write_run(
            tmp_path,
            policy,
            records=lines(10, 20, prediction=odd, answers=[odd], error=None),
            options={"kernel": odd, odd: 1},
            comparability={"odd": odd},
        )
    assert "report: " in reported(tmp_path, capsys)
