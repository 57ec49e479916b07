"""The generated tasks: reproducible, well-formed, and passed by the embedded model with the full cache."""

import re
from dataclasses import replace
from typing import Any

import pytest

from evals import pocket
from evals.errors import DataError
from evals.metrics import score_sample
from evals.prompts import encode, find
from evals.suites import load_samples
from evals.tasks import Sample
from src.models.load import load_model
from src.models.settings import model_settings
from tests.support.tiny import tiny_tokenizer

NAMES = tuple(pocket.TASKS)


def load(name: str, limit: int | None, seed: int = 0) -> list[Sample]:
    return load_samples("pocket", [name], limit, None, seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_depends_on_seed_and_number_only(name: str) -> None:
    assert (
        load(name, 3)
        == load(name, 8)[:3]
        == load_samples("pocket", None, 3, None, 0)[3 * NAMES.index(name) : 3 * NAMES.index(name) + 3]
    )
    assert load(name, 3, seed=1)[0].prompt != load(name, 3)[0].prompt
    assert len(load(name, None)) == pocket.DEFAULT_SAMPLES
    samples = load(name, 20)
    assert len({s.id for s in samples}) == len({s.prompt for s in samples}) == 20


def test_draws_are_the_same_on_every_platform() -> None:
    """The text around them may change with the Python version, what is drawn must not."""
    sample = load("few_shot", 1)[0]
    assert (sample.after, sample.answers) == FIRST_FEW_SHOT


FIRST_FEW_SHOT = ("\npig belongs", ("North",))


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_stands_in_the_context_and_scores_100(name: str) -> None:
    for sample in load(name, 20):
        (answer,) = sample.answers
        if name == "few_shot":
            assert sample.all_classes is not None and answer in sample.all_classes
            assert sample.before.count(f" belongs to {answer}\n") > 10
            word = sample.after.split()[0]
            assert word not in re.findall(r"^(\w+) belongs", sample.before, re.MULTILINE)
        else:
            number = answer.removeprefix("Paragraph ")
            assert len(re.findall(rf"\b{number}\b", sample.before)) == 1
            assert number not in sample.after
        assert score_sample(sample.task, f" {answer}", sample.answers, sample.all_classes) == 100.0
        assert score_sample(sample.task, " nothing", sample.answers, sample.all_classes) == 0.0
        assert sample.length == pytest.approx(len(sample.before.split()), abs=15)


def test_prose_is_prose() -> None:
    paragraphs = pocket.prose()
    assert sum(map(len, paragraphs)) > 100_000
    assert not any(re.search(r"\d{3}|::=|>>>|\n", text) for text in paragraphs)
    assert len(set(paragraphs)) == len(paragraphs)


def test_unknown_settings() -> None:
    with pytest.raises(DataError, match="no task of suite pocket; valid: needle"):
        load("nonsense", 1)
    with pytest.raises(DataError, match=r"tasks\.config_dir: no setting of suite pocket; it has none"):
        load_samples("pocket", None, 1, None, 0, config_dir="x")


@pytest.mark.slow
def test_lengths_in_tokens(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    for sample in load_samples("pocket", None, 20, None, 0):
        prompt = encode(sample, tokenizer, 8000)
        assert 450 <= len(prompt.ids) <= 2000, sample.id
        assert not prompt.truncated
        assert len(prompt.ids) - prompt.context_tokens < 60


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    loaded = load_model(model_settings("smollm2-135m", device="cpu"))
    return loaded.model, loaded.tokenizer


def answer(sample: Sample, model: Any, tokenizer: Any) -> str:
    import torch

    ids = torch.tensor([encode(sample, tokenizer, 8000).ids])
    stop = [model.generation_config.eos_token_id]
    if sample.task.stop_at_newline:
        stop.append(tokenizer("\n").input_ids[-1])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sample.task.max_new_tokens,
            min_new_tokens=sample.task.min_new_tokens,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_model_passes_and_needs_its_context(name: str, smollm2: tuple[Any, Any]) -> None:
    """Few samples, to stay fast; the figures over more samples stand in evals/pocket.py."""
    _, tokenizer = smollm2
    samples = load(name, 12 if name == "few_shot" else 3)  # with five labels some are right by chance

    def score(sample: Sample) -> float:
        return score_sample(sample.task, answer(sample, *smollm2), sample.answers, sample.all_classes)

    # Only the last tokens of the context, which is all that a recent window of that size would leave. Examples are
    # short: 8 tokens are the last two of them.
    left = 8 if name == "few_shot" else 40
    blind = [replace(s, before=tokenizer.decode(tokenizer(s.before).input_ids[-left:])) for s in samples]
    lost = [score(sample) for sample in blind]
    scores: list[float] = []
    while len(scores) < len(samples) and not (sum(scores) >= 50 * len(samples) and sum(scores) > sum(lost)):
        scores.append(score(samples[len(scores)]))  # no score is negative: the rest cannot change what is asked
    assert sum(scores) / len(samples) >= 50, scores
    assert sum(lost) < sum(scores), (scores, lost)


def test_where_the_answer_stands() -> None:
    """The span of the sentence that was asked for, in tokens of the whole prompt; few_shot has no single one."""
    tokenizer = tiny_tokenizer()
    for name in NAMES:
        for sample in load(name, 5):
            prompt = encode(sample, tokenizer, 10_000)
            if name == "few_shot":
                assert prompt.needle is None
                continue
            start, stop = prompt.needle or (0, 0)
            text = tokenizer.decode(prompt.ids[start:stop])
            assert text == sample.extra["needle"] and sample.answers[0].split()[-1] in text
            assert stop <= prompt.context_tokens


def test_a_needle_is_named_only_where_it_is_certain() -> None:
    tokenizer = tiny_tokenizer()
    assert find("b c", "a b c d", tokenizer, True) == (2, 5)
    assert find("b", "a b b", tokenizer, True) is None  # which of them?
    assert find("", "a b", tokenizer, True) is None and find("x", "a b", tokenizer, True) is None
    cut = replace(load("needle", 1)[0], extra={"needle": "The secret code is 1."})
    assert encode(cut, tokenizer, 100).needle is None  # truncation took it
