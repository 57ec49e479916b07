"""Each architecture is served exactly or refused at load for the right reason, and `docs/models.md` says the same."""

from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from tests.support.architectures.__main__ import row
from tests.support.architectures.build import build
from tests.support.architectures.outcome import Outcome, outcome, prompt
from tests.support.architectures.table import ARCHITECTURES
from tests.support.versions import DOCUMENTED, INSTALLED

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
HALF = ("llama", "glm4", "deepseek_v3")  # tried in bfloat16 as well: the whole list takes too long


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # self-checks are made, not remembered
    logging.disable_progress_bar()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_served_exactly_or_refused_at_load(name: str) -> None:
    expected, half = ARCHITECTURES[name], name in HALF
    if expected.model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {INSTALLED} has no {expected.model_type}")
    found = outcome(expected, half)
    assert "\n" not in found.refused + found.in_cache
    if INSTALLED != DOCUMENTED:  # it may be served or refused otherwise, but never differ
        assert found.refused or (found.exact and not found.faults and (found.in_cache or found.turning < 1e-4))
        return
    if expected.refused:
        assert expected.refused in found.refused and expected.model_type in found.refused
        assert "valid: " in found.refused
    else:
        assert found.refused == ""
        assert found.exact, f"tokens equal: {found.tokens}, logits differ by {found.logits}"
        assert found.faults == {}
        if expected.in_cache:
            assert expected.in_cache in found.in_cache and "Valid: policy.positions=original" in found.in_cache
        else:
            assert found.in_cache == "" and found.turning < 1e-4
        if half:
            assert found.half < 0.05
    written = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    line = row(name, found)
    assert written == [line] or [w.rsplit("|", 2)[0] for w in written] == [line.rsplit("|", 2)[0]], "write it anew"


def test_the_document_has_every_architecture_once_and_says_its_command() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    names = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert names[0] == "architecture" and names[1:] == list(ARCHITECTURES)
    assert "python -m tests.support.architectures --write docs/models.md" in "\n".join(text.splitlines()[:6])
    assert "DIFFERS" not in text and "WRONG" not in text and "not tried" not in text


def test_the_models_are_no_easy_ones() -> None:
    """Sharp attention and varied answers, or an error would not show."""
    for name in ("llama", "cohere", "mixtral"):
        model = build(ARCHITECTURES[name])
        with torch.inference_mode():
            logits = model(prompt(40)).logits[0]
        assert len(set(logits.argmax(-1).tolist())) > 10


def test_a_difference_would_show_in_the_table() -> None:
    wrong = Outcome(tokens=False, logits=0.5, faults={"h2o": "holds 17 entries of 16"}, turning=0.8, half=0.3)
    line = row("x", wrong)
    assert "DIFFERS" in line and "holds 17" in line and "WRONG by 8.0e-01" in line and "off by 30%" in line
