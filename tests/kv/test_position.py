"""How scores depend on the position: slopes and octaves by hand, in records, and against the theory."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from policies.ahakv import AhaKV
from policies.h2o import H2O
from policies.random import Random
from policies.streaming_llm import StreamingLLM
from policies.vatp import VATP
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from src.kv.position import log_slope, octave_means
from src.kv.prompt import PromptAttention
from src.records.record import Record
from src.retention import measures as retention
from src.retention.from_records import chosen, score_bias
from tests.support import naive
from tests.support.tiny import tiny, tokens

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)


def test_slopes_by_hand() -> None:
    j = torch.arange(1, 9, dtype=torch.float64)
    scores = torch.stack([3 / j, 2 * j.sqrt(), torch.full_like(j, 7.0)])
    assert log_slope(scores).tolist() == pytest.approx([-1, 0.5, 0])
    # two points are left: (ln 2, ln 1), (ln 8, ln 4)
    rest = torch.tensor([math.inf, 1, 0, 0, 0, 0, 0, 4], dtype=torch.float64)
    assert float(log_slope(rest)) == pytest.approx(math.log(4) / math.log(4))
    assert math.isnan(float(log_slope(torch.tensor([0.0, 1.0, math.inf]))))


def test_slopes_are_least_squares() -> None:
    """Beside numpy's own fit; for arrays `src.retention.measures` asks the same function."""
    scores = np.random.default_rng(0).gamma(1.0, size=(3, 50))
    scores[0, 4] = 0
    there = scores > 0
    x = np.log(np.arange(3, 53))
    fitted = [np.polyfit(x[row], np.log(score[row]), 1)[0] for score, row in zip(scores, there, strict=True)]
    assert log_slope(torch.tensor(scores), 3).tolist() == pytest.approx(fitted)
    assert retention.log_slope(np.hstack([np.ones((3, 2)), scores]), first=3) == pytest.approx(fitted)


def test_octaves_by_hand() -> None:
    scores = torch.tensor([[4.0, 1, 3, 5, 5, 5, 5, 9, 8], [math.inf, 2, 2, 2, 2, 2, 2, 2, 2]], dtype=torch.float64)
    first, second = octave_means(scores)
    assert first.tolist() == pytest.approx([4 / 5, 2 / 5, 5 / 5, 8.5 / 5])  # 1 | 2-3 | 4-7 | 8-9, mean 45 / 9
    assert math.isnan(second[0]) and second[1:].tolist() == pytest.approx([1, 1, 1])


def equal_logits(n: int) -> PromptAttention:
    """Queries of zeros: every row spreads evenly, which is the theory's assumption to the letter."""
    keys = torch.randn(2, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return PromptAttention(torch.zeros(4, n, 16, dtype=torch.float64), keys, keys, 0.25, 0, 1)


@pytest.mark.parametrize("normalise", ["none", "rows", "expectation"])
def test_h2o_beside_its_theory(normalise: str) -> None:
    prompt = equal_logits(300)
    found = H2O(normalise=normalise).prompt_measures(prompt, 40)  # type: ignore[arg-type]
    assert found["score_slope"].tolist() == pytest.approx([float(found["score_slope_theory"])] * 2, abs=1e-5)
    curve = retention.expected_accumulation(300)[: 300 - 20]  # 20 of the 40 are recent
    if normalise == "none":
        assert float(found["score_slope_theory"]) == pytest.approx(float(retention.log_slope(curve)), abs=1e-6)
        expected = octave_means(torch.tensor(curve.copy()))
        assert found["score_by_octave"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    elif normalise == "expectation":
        assert found["score_slope"].tolist() == pytest.approx([0, 0], abs=1e-5)


def test_value_norms_have_no_such_theory() -> None:
    found = VATP(sinks=4).prompt_measures(equal_logits(300), 40)
    assert set(found) == {"score_slope", "score_by_octave"}


def generate(*policies: object) -> list[Generation]:
    variants = [Variant(policy, 40) for policy in policies]  # type: ignore[arg-type]
    request = Request("x", tokens(200)[0].tolist(), frozenset(), 4)
    found = {g.variant: g for g in Engine(tiny("llama"), 10).run([Job(request, variants)])}
    return [found[variant] for variant in variants]


def test_recorded_by_layer() -> None:
    h2o, aha, uniform, streaming = generate(H2O(), AhaKV(window=8), Random(), StreamingLLM())
    for result in (h2o, aha, uniform):
        assert np.array(result.extra["score_slope"]).shape == (2, 2)  # layers, KV heads
        assert [len(octaves) for octaves in result.extra["score_by_octave"]] == [8, 8]  # 180 to 192 positions
    assert "score_slope_theory" in h2o.extra and "score_slope_theory" not in aha.extra
    assert not streaming.extra  # it has no score
    assert np.mean(h2o.extra["score_slope"]) < -0.3
    assert abs(np.mean(uniform.extra["score_slope"])) < 0.3


def record(task: str, **line: Any) -> Record:
    return Record.of({"task": task, "id": "1", "prompt_hash": "aa", **line})


def test_in_metrics_by_hand() -> None:
    records = [
        record("a", score_slope=[[-1.0], [-0.5]], score_slope_theory=[-0.8, -0.8]),
        record("b", score_slope=[[-0.6], [None]], score_slope_theory=[-0.6, -0.6]),
        record("b", score=3),
    ]
    found = score_bias(records)["score_slope"]
    assert found == {
        "samples": 2, "mean": -0.7, "theory": -0.7, "per_layer": [-0.8, -0.5], "per_head": [[-0.8], [-0.5]],
        "per_task": {"a": -0.75, "b": -0.6},
    }  # fmt: skip
    assert score_bias([record("b", score=3)]) == {}


def test_chosen_tokens_by_hand() -> None:
    first, last = [0.0] * 64, [0.0] * 64
    first[0], last[63], last[62] = 1.0, 0.25, 0.75
    records = [
        record("a", chosen_positions=first, chosen_by_layer=[3.0, 5.0], chosen_share=0.5, prompt_tokens=640),
        record("b", chosen_positions=last, chosen_by_layer=[1.0, 1.0], chosen_share=0.25, prompt_tokens=1280),
        record("b", chosen_positions=[0.0] * 64),  # its steps chose no token of the prompt
    ]
    found = chosen(records)["chosen"]
    assert (found["samples"], found["share"], found["tokens_per_layer"]) == (2, 0.375, [2.0, 3.0])
    assert found["decile_shares"] == [0.5, *[0] * 8, 0.5]
    assert found["mean_position"] == pytest.approx((0.5 + 0.25 * 63.5 + 0.75 * 62.5) / 2 / 64, abs=1e-5)
    # shares 1/2, 3/8, 1/8 against 1/64 each
    kl = math.log(64) + 0.5 * math.log(0.5) + 0.375 * math.log(0.375) + 0.125 * math.log(0.125)
    assert found["kl_uniform"] == pytest.approx(kl, abs=1e-5)
    assert found["per_task"]["a"]["decile_shares"][0] == 1
    assert chosen([record("b", score=3)]) == {}


def test_bfloat16_and_negative_scores() -> None:
    scores = torch.rand(3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert log_slope(scores).dtype == octave_means(scores).dtype == torch.float32
    assert float(log_slope(scores)) == pytest.approx(float(log_slope(scores.float())), abs=1e-6)
    mixed = torch.tensor([-1.0, 2.0, 3.0])
    assert octave_means(mixed).isnan().all() and log_slope(mixed).isnan()
