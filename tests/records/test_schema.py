"""The schemas: a line survives as it is, a policy's figures stay apart, and docs/results.md says what is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.records.__main__ import TABLES, filled, main
from src.records.files import load_records
from src.records.folder import RunFolder
from src.records.record import FIELDS, MEASURES, VERSION, Record, fault, read_line, reserved
from tests.support.cli import call, lines, metrics
from tests.support.synthetic_runs import record

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results.md"
NAMES = {"task": "qa", "id": "1", "prompt_hash": "aa"}


# --- lines ---


def test_a_line_comes_back_with_fields_measures_and_version() -> None:
    one = Record(**NAMES, score=12.5, answers=["a – b"], measures={"score_slope": [[-1.0, None]], "mine": {"x": 1}})
    found, has_check, why = read_line(one.line())
    assert found == one and has_check and not why and found.schema_version == VERSION
    assert found.measures == one.measures and found.line() == one.line()


def test_a_line_is_flat_and_says_null_where_it_always_did() -> None:
    line = json.loads(Record(**NAMES, score=12.5, measures={"score_slope": [[-1.0]]}).line())
    assert line.pop("check") and line == {
        **NAMES, "all_classes": None, "length": None, "score": 12.5, "fidelity": None, "error": None,
        "schema_version": VERSION, "score_slope": [[-1.0]],
    }  # fmt: skip


def test_a_line_of_an_earlier_or_later_version_keeps_what_it_says() -> None:
    before = record("qasper", 1, 50.0, 64, chosen_share=0.5)
    one = Record.of(before)
    assert one.schema_version == 0 and one.measures == {"chosen_share": 0.5} and one.as_dict() == before
    later = {**before, "schema_version": VERSION + 1, "a_later_field": [1]}
    assert Record.of(later).as_dict() == later


def test_an_old_folder_goes_on(tmp_path: Path) -> None:
    """Flat lines without a version: read, counted, added to, and written again as they were."""
    before = [record("qasper", i, 50.0, 64, score_slope=[[-1.0]]) for i in range(2)]
    with RunFolder(tmp_path, {}) as run:
        for line in before:
            run.append(Record.of(line))
    assert all("schema_version" not in line for line in lines(tmp_path))
    old = (tmp_path / "predictions.jsonl").read_bytes()
    with RunFolder(tmp_path, {}) as run:
        assert run.done(Record.of(before[0]).key)
        run.append(Record(**NAMES, score=20.0))
        assert run.finish(policy="p", model="m", budget=64, plot=False)["average"] == 35.0
    assert (tmp_path / "predictions.jsonl").read_bytes().startswith(old)
    assert [r.measures for r in load_records(tmp_path)] == [{}, *[{"score_slope": [[-1.0]]}] * 2]


def test_the_same_malformed_row_is_the_same_record_in_an_old_folder() -> None:
    now = Record(**NAMES, prompt_tokens=0, truncated=False, prediction="", new_tokens=0, error="no prompt")
    old = {name: value for name, value in now.as_dict().items() if name not in ("schema_version", "fidelity")}
    assert Record.of(old) == now


# --- a policy's own figures ---


@pytest.mark.parametrize("name", [*FIELDS, "check"])
def test_no_measure_passes_for_a_field(name: str) -> None:
    assert reserved({name: 99, "mine": 1}) == [name]
    with pytest.raises(ValueError, match=name):
        Record(**NAMES, score=10.0, measures={name: 99})


@pytest.mark.parametrize("name", ["score", "thought", "kv_bytes_host", "peak_bytes", "check", "schema_version"])
def test_a_policy_that_names_a_measure_like_a_field_fails(
    base: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also a field that this very record does not have."""
    monkeypatch.setattr("policies.h2o.H2O.measures", lambda *_: {name: 99})
    done = call("run", *base, "policy=h2o", "budget=40", "limit=1")
    assert done.code == 1 and f"measures gave '{name}'" in done.err
    (line,) = lines(done.folder)
    assert line["score"] is None and line.get(name) != 99


def test_a_policy_s_own_name_is_kept_apart(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.h2o.H2O.measures", lambda *_: {"mine": [1, 2]})
    folder = call("run", *base, "policy=h2o", "budget=40", "limit=1").folder
    (one,) = load_records(folder)
    assert one.measures["mine"] == [1, 2] and lines(folder)[0]["mine"] == [1, 2]


# --- what is said of the fields ---


def test_faults_name_the_field_and_what_it_should_be() -> None:
    assert fault(NAMES) is None
    assert fault({}) == "task should be a task's name" and fault({**NAMES, "id": 1}) == "id should be text"
    assert fault({**NAMES, "score": 101}) == "score should be a number from 0 to 100"
    assert fault({**NAMES, "chosen_share": "x"}) == "chosen_share should be a number from 0 on"
    assert not set(FIELDS) & set(MEASURES)


def test_the_docs_tables_are_the_schemas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert filled(text) == text, "python -m src.records --write docs/results.md"
    assert all(about.what for fields in TABLES.values() for about in fields.values())
    copy = tmp_path / "results.md"
    copy.write_text(text.replace("| `score` |", "| `skore` |"), encoding="utf-8")
    assert main(["--write", str(copy)]) == 0 and copy.read_text(encoding="utf-8") == text
    copy.write_text("no table", encoding="utf-8")
    assert main(["--write", str(copy)]) == 2 and "has the tables (none)" in capsys.readouterr().err


def test_metrics_hold_what_the_schema_says_and_nothing_else(base: list[str]) -> None:
    folder = call("run", *base, "policy=h2o", "budget=40", "fidelity=true", "limit=1").folder
    found: dict[str, Any] = metrics(folder)
    known = {name: set(fields) for name, fields in TABLES.items()}
    assert set(found) - {"check"} <= known["metrics"] and {"thoughts", "reconstruction"} >= known["metrics"] - set(
        found
    )
    for part in ("memory", "speed", "retention"):
        assert set(found[part]) <= known[part], part
    assert set(found["retention"]) >= known["retention"] - {"only_counts", "needle", "chosen"}
    assert all(set(figures) <= known["tasks"] for figures in found["tasks"].values())
    (line,) = lines(folder)
    assert set(line) - {"check"} <= known["record"] | known["measures"]


def test_what_is_scored_is_the_answer_after_a_thought() -> None:
    plain = Record(task="t", id="1", prompt_hash="h", prediction="the box")
    assert (
        plain.scored == replace(plain, prediction="<think>a hat?</think>the box", answer="the box").scored == "the box"
    )
    assert replace(plain, prediction="<think>a hat", answer="").scored == replace(plain, prediction=None).scored == ""
