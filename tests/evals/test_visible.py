"""Text from outside on a terminal, in a log and in a spreadsheet; the peer's interpreter."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest

from evals import score
from evals.errors import DataError
from evals.visible import csv_cell, one_line, shortened, visible
from policies.full import Full
from src.bench.peers import Peer
from src.config.cells import CellConfig
from src.config.main import complain
from src.engine.request import Variant
from src.errors import InputError
from src.logs import VisibleFormatter
from src.records.record import Record
from src.session.progress import Progress

ESC = "\x1b]0;title\x07\x1b[31mred\x9b0m\u202e\ud800"
SENT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]")


def test_every_control_character_is_shown() -> None:
    shown = r"\x1b]0;title\x07\x1b[31mred\x9b0m\u202e\ud800"
    assert visible(ESC) == shown and visible(shown) == shown
    assert visible("a\tb\nc\rd") == r"a\tb\nc\rd" and visible("a\tb\nc", keep="\n\t") == "a\tb\nc"
    assert visible("Ünï – 中文 👩‍🔬") == "Ünï – 中文 👩‍🔬"
    assert one_line(" a\n\n b\x1b ") == r"a b\x1b"
    long = shortened("a" * 100 + "\x1b" + "b" * 100)
    assert len(long) == 60 and long[0] == "a" and long[-1] == "b"


@pytest.mark.parametrize(
    "text", ["=1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", "\x00=1", "  =1", "＝1", "\x1bx", "-"]
)
def test_text_never_begins_a_formula(text: str) -> None:
    assert str(csv_cell(text)).startswith("'") and not SENT.search(str(csv_cell(text)))


@pytest.mark.parametrize("value", [-1.5, -1, 0, 2.5, None, "−1.5", "snapkv", "a=b", "1-2"])
def test_numbers_and_plain_words_stay(value: object) -> None:
    assert csv_cell(value) is value or csv_cell(value) == value


@pytest.mark.parametrize("kind", [InputError, DataError])
def test_errors_are_one_harmless_line(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    said = str(kind(f"policy={ESC}\nmore"))
    assert "\n" not in said and not SENT.search(said) and r"\x1b[31mred" in said
    assert complain(f"a={ESC}") == 2
    assert not SENT.search(capsys.readouterr().err)


def test_warnings_are_harmless() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "%s: cut", (ESC,), None)
    said = VisibleFormatter("%(levelname)s: %(message)s").format(record)
    assert said.startswith(r"WARNING: \x1b]0;title") and not SENT.search(said)


def test_progress_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    cell = CellConfig("x", {}, Variant(Full(), None), f"[red]{ESC}[/nothing]")
    progress = Progress([cell], 1)
    with progress:
        progress.done(cell, Record(task="x", id="1", prompt_hash="", score=5.0))
    said = capsys.readouterr().err
    assert not SENT.search(said) and r"[red]\x1b]0;title" in said
    progress.console.print(progress._drawing())  # markup in a name is text
    assert "[red]" in capsys.readouterr().err.replace("\n", "")


def test_scores_of_hostile_file_names_are_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qasper.jsonl").write_text(
        json.dumps({"pred": "cat", "answers": ["cat"], "all_classes": None, "length": 1})
    )
    assert score.main([str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"qasper": 100.0}
    assert score.main([str(tmp_path / ESC[:8])]) == 2
    assert not SENT.search(capsys.readouterr().err)


def test_a_peer_that_is_no_interpreter_is_one_line(tmp_path: Path) -> None:
    (script := tmp_path / "echo").write_text(f"#!{sys.executable}\nprint('hello')\n")
    (dead := tmp_path / "dead").write_text("#!/bin/false\n")
    (broken := tmp_path / "broken").write_bytes(b"\x7fELF nothing")
    (closed := tmp_path / "closed").write_text("")
    for path in (script, dead, broken):
        path.chmod(0o755)
    expected = {tmp_path: "Permission denied", broken: "cannot be run", closed: "Permission denied", script: "hello"}
    expected |= {dead: "process ended", tmp_path / "none": "no such file", Path("x" * 5000): "too long"}
    for path, why in expected.items():
        with pytest.raises(InputError, match=r"^peer_python") as refused:
            Peer(str(path), "model")
        assert why in str(refused.value)
