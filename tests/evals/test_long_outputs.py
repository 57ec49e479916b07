"""LongGenBench from its file to a scored record: stop rules, lengths, both scorers, the reference output."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.suites import load_samples
from evals.tasks import Sample
from policies.full import Full
from policies.h2o import H2O
from policies.scope import Scope
from src.config.compose import compose, composing
from src.config.settings import RunSettings, read_settings
from src.engine.engine import Engine
from src.engine.request import Job, Variant
from src.records.record import Record
from src.session.samples import prepare, to_record, to_request
from tests.support import naive
from tests.support.tiny import tiny_loaded

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    row = {
        "prompt": "Answer_8:\nOne. The answer is 1.\n\nFollowing Question:\nQuestion_9:\n2+3?\nQuestion_10:\n4+4?\n\n",
        "questions": ["2+3?", "4+4?"],
        "answers": ["2+3=<<2+3=5>>5\n#### 5", "Easy.\n#### 8"],
    }
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "gsm8k_30.jsonl").write_text(json.dumps(row) + "\n")
    return load_samples("longgenbench", ["gsm8k_30"], None, str(tmp_path), 0)[0]


def config(**changes: Any) -> RunSettings:
    with composing():
        settings: RunSettings = read_settings("config", compose("config"))
    return replace(settings, **changes)


def test_stop_rules(sample: Sample) -> None:
    """Only the end token stops, whatever else the model knows, never at once; no chat form is put around the prompt."""
    loaded = tiny_loaded(stop_ids=frozenset({1, 5}))
    one = prepare(sample, loaded)
    assert loaded.tokenizer.decode(one.ids) == sample.prompt
    request = to_request(one, loaded, config())
    assert (request.stop_ids, request.min_new_tokens, request.max_new_tokens) == (frozenset({1}), 1, 4096)
    stubborn = loaded.model.get_output_embeddings()
    with torch.no_grad():
        stubborn.weight[1] = 0
        stubborn.weight *= 0
        stubborn.bias = torch.nn.Parameter(torch.zeros(stubborn.weight.shape[0]), requires_grad=False)
        stubborn.bias[1] = 1.0  # the end token always wins
    result = next(Engine(loaded.model, 1).run([Job(request, [Variant(Full(), None)])]))
    assert result.finish == "stop" and len(result.tokens) == 2 and result.tokens[1] == 1 != result.tokens[0]


def test_a_scored_record(sample: Sample) -> None:
    loaded = tiny_loaded()
    cfg = config(max_new_tokens=30, fidelity=True)
    one = prepare(sample, loaded)
    request = to_request(one, loaded, cfg)
    assert request.reference is not None and len(request.reference) == 30  # as long as the output may be
    variants = [Variant(H2O(), 40), Variant(Scope(strategy="discontinuous"), 40)]
    for result in Engine(loaded.model, 10).run([Job(request, variants)]):
        record = to_record(one, result, loaded, cfg)
        assert record.finish == "length" and record.new_tokens == 30
        assert record.score == 0 and set(record.extra_scores or ()) == {"by_number"}
        assert record.fidelity and record.fidelity["tokens"] == 30
        assert Record.of(json.loads(json.dumps(record.as_dict()))) == record


def test_the_reference_output(sample: Sample) -> None:
    """All answers in the form of the worked examples; both scorers give it full marks."""
    assert sample.reference == ("Answer_9:\n2+3=5\nThe answer is 5.\n\nAnswer_10:\nEasy.\nThe answer is 8.\n\n")
    from evals.longgen_metrics import by_number, official

    for scorer in (official, by_number):
        assert scorer("longgen_number_score", sample.reference, sample.answers) == 1.0


def test_a_least_length_keeps_stop_tokens_away(sample: Sample) -> None:
    loaded = tiny_loaded(stop_ids=frozenset({1}))
    request = to_request(prepare(sample, loaded), loaded, config(min_new_tokens=20, max_new_tokens=30))
    assert request.min_new_tokens == 20
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[1] = 10 * loaded.model.get_output_embeddings().weight[3]
    (result,) = Engine(loaded.model, 1).run([Job(request, [Variant(H2O(), 40)])])
    assert len(result.tokens) >= 20 and 1 not in result.tokens[:20]
