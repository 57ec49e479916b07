"""`python -m evals.score`: what it prints, and one line and exit code 2 for bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.score import main

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def row(pred: str, *answers: str, classes: list[str] | None = None) -> dict[str, object]:
    return {"pred": pred, "answers": list(answers), "all_classes": classes, "length": 10}


def test_prints_one_json_object(tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", row("Paris", "Paris"), row("x", "y"), row("a Rome", "Rome", "Oslo"))
    write(tmp_path / "lcc.jsonl", row("abxcd", "cdab"))
    (tmp_path / "result.json").write_text("{}")
    command = [sys.executable, "-m", "evals.score", str(tmp_path), "--edit-similarity"]
    done = subprocess.run([*command, "difflib"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"hotpotqa": 66.67, "lcc": 44.0}
    assert done.stdout.count("\n") == 1


def test_the_last_rows_classes_serve_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "trec.jsonl", row("City", "City", classes=["Country"]), row("x", "y", classes=["City"]))
    assert main([str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"trec": 50.0}


def test_longgenbench_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pred = "Answer_6: The answer is (B)\nAnswer_8: The answer is (A)"
    write(tmp_path / "csqa" / "H2O.json", {"pred": pred, "answers": ["B", "C", "A"]})
    write(tmp_path / "mmlu_60.jsonl", {"pred": pred, "answers": ["B", "C", "A"]})
    assert main([str(tmp_path)]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["csqa"] == scores["mmlu_60"] == 33.3333
    assert scores["csqa_by_number"] == scores["mmlu_60_by_number"] == 66.6667


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda d: None, "holds no <task>.jsonl"),
        (lambda d: write(d / "nonsense.jsonl", row("a", "b")), "'nonsense' is no task"),
        (lambda d: (d / "lcc.jsonl").write_text(""), "lcc.jsonl: holds no predictions"),
        (lambda d: (d / "lcc.jsonl").write_text('\n{"pred": "a"'), "lcc.jsonl, line 2: broken JSON"),
        (lambda d: write(d / "lcc.jsonl", row("a", "b"), [1]), "lcc.jsonl, line 2: expected a JSON object"),
        (lambda d: write(d / "lcc.jsonl", {"answers": ["a"]}), "lcc.jsonl, line 1: field 'pred' is missing"),
        (lambda d: write(d / "lcc.jsonl", {"pred": None, "answers": ["a"]}), "'pred' must be a string"),
        (
            lambda d: write(d / "lcc.jsonl", {"pred": "", "answers": "a"}),
            "'answers' must be a list of strings",
        ),
        (lambda d: (d / "lcc.jsonl").write_bytes(b'{"pred": "\xff"}'), "line 1: not UTF-8"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    build: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path)
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
