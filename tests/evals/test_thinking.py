"""Thoughts: where they end, that they are never scored, and that a template's switch is used."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken

from evals.prompts import encode, render
from evals.score import score_folder
from evals.tasks import Sample, Task
from evals.templates import read_template
from evals.thoughts import find_thought, opens_thought
from src.compare.matched import make_study
from src.errors import InputError
from src.models.chat import chat_form
from src.models.settings import ModelSettings, model_settings
from src.session.samples import Prepared, spoken
from tests.support.cli import call, lines, longbench_folder, metrics, row
from tests.support.tiny import tiny_loaded, tiny_tokenizer

# As Qwen3 writes it: without the switch the model thinks.
QWEN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
R1 = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant><think>\n"


@pytest.mark.parametrize(
    ("text", "state", "answer"),
    [
        ("the red box", "none", "the red box"),
        ("  a < b, think > c\n", "none", "  a < b, think > c\n"),  # untouched, blanks too
        ("<think>\nblue?\n</think>\n\nthe red box", "finished", "the red box"),
        ("<think>\n\n</think>\n\nthe red box", "empty", "the red box"),
        ("blue?\n</think>\n\nthe red box", "finished", "the red box"),  # the prompt had opened it
        ("</think>the red box", "empty", "the red box"),
        ("<think>\nblue", "unfinished", ""),
        ("<think>a</think>\n<think>b</think>\nthe red box", "finished", "the red box"),
        ("<think>a</think> x <think>b", "unfinished", ""),
        ("Well. <think>a</think>the red box", "finished", "the red box"),
        ("<think>a</think>", "finished", ""),
        ("<think>a</think>\n\n    return 1", "finished", "    return 1"),
        ("<think>a</think>\n<answer>\nthe red box\n</answer>", "finished", "\nthe red box\n"),
        ("<think>a</think>\n<answer>the red", "finished", "the red"),
        ("<thinking>a</thinking>the red box", "finished", "the red box"),
        ("<thought>a</thought>the red box", "finished", "the red box"),
        ("<seed:think>a</seed:think>the red box", "finished", "the red box"),
        ("[THINK]a[/THINK]the red box", "finished", "the red box"),
        ("[THINK]a", "unfinished", ""),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>", "finished", "b"),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>the red box",
            "finished",
            "the red box",
        ),
        ("<|channel|>analysis<|message|>a", "unfinished", ""),
        ("<|channel|>final<|message|>the red box", "empty", "the red box"),
        ("analysisThe box is red.assistantfinalthe red box", "finished", "the red box"),
        ("analysis of the box", "none", "analysis of the box"),
        ("Here is my thought process: a Here is my response: b", "finished", " b"),
        ("Here is my thought process: a", "unfinished", ""),
        ("He said: Here is my response: b", "none", "He said: Here is my response: b"),
    ],
)
def test_where_a_thought_ends(text: str, state: str, answer: str) -> None:
    found = find_thought(text)
    assert (found.state, found.answer) == (state, answer)


def test_a_thought_that_the_prompt_opened() -> None:
    assert opens_thought("<assistant><think>\n") and opens_thought("[THINK]") and not opens_thought("<think></think>\n")
    assert find_thought("the red box", opened=True).state == "unfinished"
    assert find_thought("a</think>b", opened=True).answer == "b"


def test_published_predictions_are_scored_after_their_thoughts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in [("hotpotqa", "<think>blue?</think>the red box"), ("musique", "<think>the red box")]:
        line = {"pred": said, "answers": ["the red box"], "all_classes": None}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    # The first line of the answer, not of the thought.
    trec = {"pred": "<think>\nx\n</think>\n\ncity\nmore", "answers": ["city"], "all_classes": ["city", "more"]}
    (tmp_path / "trec.jsonl").write_text(json.dumps(trec) + "\n")
    assert score_folder(tmp_path) == {"hotpotqa": 100.0, "musique": 0.0, "trec": 100.0}
    shown = capsys.readouterr().err.splitlines()
    assert shown[1].startswith("musique.jsonl: 1 of 1 predictions hold a thought") and "1 are cut" in shown[1]


def filled(template: str, kwargs: dict[str, Any] | None = None, thinking: str = "off") -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return render("Q", tokenizer, kwargs or {}, thinking)


def test_the_switch_is_used_where_there_is_one() -> None:
    assert filled(QWEN).endswith("<assistant><think>\n\n</think>\n\n")
    assert filled(QWEN, thinking="keep").endswith("<assistant>")
    assert filled(QWEN, {"enable_thinking": True}).endswith("<assistant>")  # given settings win


SWITCHES = {
    "{% if thinking %}x{% endif %}": {"thinking": False},  # Granite
    "{% if not thinking is defined %}{% set thinking = true %}{% endif %}{{ thinking }}": {"thinking": False},
    "{% if reasoning is not false %}x{% endif %}": {"reasoning": False},
    "{% if disable_thinking %}x{% endif %}": {"disable_thinking": True},
    "{{ thinking_budget }}": {"thinking_budget": 0},
    "{% if reasoning_effort not in ['none', 'high'] %}x{% endif %}": {"reasoning_effort": "none"},
    "{{ reasoning_effort or 'medium' }}": {},  # gpt-oss cannot be switched off
    "{% set thinking = messages[0].thinking %}{{ thinking }}": {},
    "{% generation %}{{ messages[0].thinking }}{% endgeneration %}": {},
    "{% for thought in messages %}{{ thought.content }}{% endfor %}": {},
    "a plain enable_thinking {# enable_thinking #}": {},
}


@pytest.mark.parametrize("template", SWITCHES)
def test_switches(template: str) -> None:
    assert read_template(template).off_switch == SWITCHES[template]


def form(template: str, **changes: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return chat_form(tokenizer, ModelSettings.of(model_settings("local", **changes)), "tiny")


def test_what_the_settings_hash_knows() -> None:
    """Nothing new for a model without a switch, and Qwen3's folders keep their names."""
    plain = form(str(tiny_tokenizer().chat_template))
    assert (plain.kwargs, plain.settings, plain.thinking_note) == ({}, {}, "")
    off = form(QWEN, thinking=False)  # a bare `off` in YAML
    assert (off.kwargs, off.settings) == ({"enable_thinking": False}, {})
    assert off == form(QWEN, template_kwargs={"enable_thinking": False})
    assert off.thinking_note == "off: enable_thinking=false"
    assert (form(QWEN, thinking="keep").kwargs, form(QWEN, thinking="keep").settings) == ({}, {"thinking": "keep"})
    assert (form(R1).settings, form(R1).thinking_note) == ({"thinking": "off"}, "off: no switch passed")
    with pytest.raises(InputError, match=r"model\.thinking=on: valid: off, keep"):
        form(QWEN, thinking="on")


def test_the_answer_is_scored_and_the_marks_stay() -> None:
    """Also where the marks are special tokens, which decoding drops."""
    model = tiny_loaded()
    model.tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("[THINK]", special=True), AddedToken("[/THINK]", special=True)]}
    )
    one = Prepared(SimpleNamespace(), SimpleNamespace(thought=False), [], ("", "", ""))  # type: ignore[arg-type]

    def said(text: str, finish: str = "length") -> Any:
        tokens = model.tokenizer.encode(text, add_special_tokens=False)
        return spoken(one, SimpleNamespace(tokens=tokens, finish=finish), model)  # type: ignore[arg-type]

    whole = said("[THINK]abc[/THINK]the box<eos>", "stop")
    assert (whole.text, whole.answer) == ("[THINK]abc[/THINK]the box", "the box")
    assert whole.thought == {"thought": "finished", "thought_tokens": 5, "answer": "the box"}
    cut = said("[THINK]abc")
    assert (cut.text, cut.thought["thought"], cut.thought["thought_tokens"]) == ("[THINK]abc", "unfinished", 4)
    usual = said("the box<eos>", "stop")
    assert (usual.text, usual.thought) == ("the box", {})  # an ordinary line has no new field


def test_a_prompt_that_ends_in_a_thought() -> None:
    tokenizer = tiny_tokenizer()
    sample = Sample(Task("t", "pocket", "qa_f1_score", 8, True, False, False), "0", "context", "?", ("a",))
    assert not encode(sample, tokenizer, 100).thought
    tokenizer.chat_template = R1
    assert encode(sample, tokenizer, 100).thought


def test_unfinished_thoughts_are_counted(base: list[str], tmp_path: Path) -> None:
    """The tiny model never closes the thought that the template opened: every score is 0, and it is said."""
    data = longbench_folder(tmp_path / "data", [row(0), row(1, answers=["e", "a", "o", "t", "n"])])
    arguments = [*base, "tasks=hotpotqa", f"tasks.data_dir={data}", "policy=h2o", "budget=40", "model.thinking=keep"]
    done = call("run", *arguments, "model.chat_template='" + R1.replace("'", "\\'") + "'")
    assert done.code == 0, done.err
    assert "2 predictions end in the middle of a thought; they score 0" in done.err
    found = lines(done.folder)
    assert [(r["thought"], r["answer"], r["score"]) for r in found] == [("unfinished", "", 0.0)] * 2
    counts = [r["new_tokens"] - (r["finish"] == "stop") for r in found]  # the end token is no part of the thought
    assert [r["thought_tokens"] for r in found] == counts
    thoughts = metrics(done.folder)["thoughts"]
    assert thoughts == {"empty": 0, "finished": 0, "unfinished": 2, "tokens_mean": sum(counts) / 2}
    assert metrics(done.folder)["comparability"]["thinking"] == "keep: no switch passed"
    (warning,) = [text for text in make_study([done.folder]).warnings if "thought" in text]
    assert "2 of 2 predictions end in the middle of a thought and score 0" in warning


def test_qwen3_is_switched_off_by_its_template() -> None:
    """As its settings did by hand before, so its folders keep their names; and `keep` lets it think."""
    settings = model_settings("qwen3-8b")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = QWEN
    assert chat_form(tokenizer, ModelSettings.of(settings), "qwen3-8b").kwargs == {"enable_thinking": False}
    keeping = ModelSettings.of({**settings, "thinking": "keep"})
    assert chat_form(tokenizer, keeping, "qwen3-8b").kwargs == {}
