"""Properties of the policies' formulas that the papers state or that follow from them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.ahakv import AhaKV, softmax_with_gain, solve_entropy
from policies.base import Policy, RankedPolicy, lowest_slot
from policies.full import Full
from policies.h2o import H2O
from policies.snapkv import SnapKV, pool, pool_cached
from policies.streaming_llm import StreamingLLM
from src.kv.prompt import PromptAttention, vector_norm
from tests.support import naive

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

N, HEADS, KV_HEADS, DIM = 120, 4, 2, 16
PLAIN = {"step_gain": False, "value_prior": False}


def prompt(n: int = N, seed: int = 0, scale: float = 2.0) -> PromptAttention:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(h, n, DIM, generator=draw, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS))
    return PromptAttention(q * scale, k, v, DIM**-0.5, 0, 1)


def square(p: PromptAttention) -> Tensor:
    """The whole attention matrix, (kv_heads, group, n, n)."""
    q = p.queries.view(p.kv_heads, p.group, p.length, -1)
    logits = q @ p.keys[:, None].transpose(-1, -2) * p.scaling
    return logits.masked_fill(torch.ones(p.length, p.length).triu(1).bool(), -torch.inf).softmax(-1)


def test_h2o_scores_are_the_column_sums() -> None:
    p = prompt()
    assert torch.allclose(H2O().score(p, 20), square(p).sum(2).mean(1))
    assert torch.allclose(p.column_sums().sum(-1), torch.tensor(float(N), dtype=torch.float64))  # rows sum to one


@pytest.mark.parametrize(("budget", "recent"), [(2, 1), (3, 1), (10, 5), (11, 5), (100, 50)])
def test_h2o_halves_its_budget(budget: int, recent: int) -> None:
    assert H2O().recent(budget) == recent
    assert H2O(heavy_share=1.0).recent(budget) == 1
    assert H2O(heavy_share=0.0).recent(budget) == budget - 1


def test_recent_accumulation_alone_is_snapkv_without_pooling() -> None:
    """Papers: r = 32 rows summed is SnapKV's window sum (w = 32)."""
    p = prompt()
    for window in (8, 32):
        snap = SnapKV(window=window, kernel=1)
        aha = AhaKV(window=window, **PLAIN)
        assert torch.allclose(aha.score(p, 40), snap.score(p, 40))
        assert torch.equal(aha.keep_prompt(p, 40), snap.keep_prompt(p, 40))
        pooled = AhaKV(window=window, score_pool=7, **PLAIN)
        assert torch.allclose(pooled.score(p, 40), SnapKV(window=window).score(p, 40))
    everything = AhaKV(recent_accumulation=False, **PLAIN)
    assert torch.allclose(everything.score(p, 40), H2O().score(p, 40)[:, :-32])


def test_one_row_is_ranked_alike_with_and_without_the_gain() -> None:
    """Step-gain softmax is monotone within a row: for r = 1, one query head and no value prior it changes nothing."""
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, N, DIM, generator=draw, dtype=torch.float64) for _ in range(3))
    p = PromptAttention(q, k, v, DIM**-0.5, 0, 1)
    gain = AhaKV(window=1, value_pool=1, value_prior=False)
    plain = AhaKV(window=1, value_pool=1, **PLAIN)
    assert not torch.allclose(gain.score(p, 20), plain.score(p, 20))
    assert torch.equal(gain.score(p, 20).argsort(-1), plain.score(p, 20).argsort(-1))
    assert torch.equal(gain.keep_prompt(p, 20), plain.keep_prompt(p, 20))
    # With more rows it does.
    more = [AhaKV(window=8, value_prior=False), AhaKV(window=8, **PLAIN)]
    assert not torch.equal(more[0].keep_prompt(p, 20), more[1].keep_prompt(p, 20))


@pytest.mark.parametrize(
    ("visible", "budget", "gain", "entropy"),
    [(7500, 1000, 2.007, 6.98), (3950, 720, 1.845, 6.54), (4096, 256, 2.355, 5.69), (1024, 128, 2.039, 4.99)],
)
def test_gain_brings_gaussian_rows_near_the_entropy_of_the_budget(
    visible: int, budget: int, gain: float, entropy: float
) -> None:
    """64 Gaussian queries, d = 128: the row entropy is near ln k, and well above it without the gain."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(64, 128, generator=draw), torch.randn(visible, 128, generator=draw)
    logits = q @ k.T * 128**-0.5
    found = AhaKV()._gain(torch.tensor(visible), budget, torch.float32)
    assert float(found) == pytest.approx(gain, abs=1e-3)

    def mean_entropy(factor: Tensor) -> float:
        return float(torch.special.entr(softmax_with_gain(logits, factor)).sum(-1).mean())

    assert mean_entropy(found) == pytest.approx(entropy, abs=0.15)
    assert mean_entropy(found) == pytest.approx(math.log(budget), abs=0.25)
    assert mean_entropy(torch.ones(())) > math.log(budget) + 1
    # The extension solves for it exactly.
    solved = solve_entropy(logits[None, None], math.log(budget))
    assert mean_entropy(solved[0, 0]) == pytest.approx(math.log(budget), abs=1e-3)


def test_gain_guards() -> None:
    seen = torch.tensor([10, 20, 21, 32, 33, 100])  # 20 sqrt(e) = 32.97
    formula = [0, 0, *(math.sqrt(2 * math.log(i / 20)) for i in (21, 32, 33, 100))]

    def gain(guard: Any, of: AhaKV | None = None) -> list[float]:
        policy = of or AhaKV(gain_guard=guard)
        return policy._gain(seen, 20 + (32 if of else 0), torch.float64).tolist()

    assert gain("literal") == pytest.approx(formula)
    assert gain("skip") == pytest.approx(formula)
    assert AhaKV(gain_guard="skip")._counts(seen, 20).tolist() == [0, 0, 1, 1, 1, 1]
    assert AhaKV(gain_guard="literal")._counts(seen, 20).tolist() == [1] * 6
    assert gain("softmax") == pytest.approx([1, 1, 1, 1, *formula[4:]])
    assert gain("softmax", AhaKV(gain_budget="history")) == pytest.approx([1, 1, 1, 1, *formula[4:]])


def test_accumulated_attention_is_biased_and_recent_accumulation_is_not() -> None:
    """With uniform rows H2O's score of token j is H_n - H_(j-1); that of the last r rows is flat."""
    p = prompt(n=200, scale=0.0)
    harmonic = [sum(1 / i for i in range(j, 201)) for j in range(1, 201)]
    assert torch.allclose(H2O().score(p, 64)[0], torch.tensor(harmonic, dtype=torch.float64))
    flat = AhaKV(**PLAIN).score(p, 64)
    assert torch.allclose(flat, flat[:, :1].expand_as(flat))
    assert float(flat[0, 0]) == pytest.approx(harmonic[168])


def test_value_prior() -> None:
    p = prompt()
    base, prior = AhaKV(value_prior=False).score(p, 40), AhaKV().score(p, 40)
    for head in range(KV_HEADS):
        norms = [float(p.values[head, j].square().sum()) for j in range(N)]
        near = [norms[max(0, j - 2) : j + 3] for j in range(N - 32)]
        gamma = [sum(x) / len(x) for x in near]
        expected = base[head] * torch.tensor(gamma) / max(gamma)
        assert torch.allclose(prior[head], expected)
    assert torch.isinf(AhaKV(sinks=3).score(p, 40)[:, :3]).all()


def test_norms() -> None:
    v = torch.tensor([[3.0, -4.0]])
    assert [float(vector_norm(v, kind)) for kind in ("l1", "l2", "l2_squared")] == [7, 5, 25]


def test_pooling_does_not_see_the_window() -> None:
    """A token just before SnapKV's window must not inherit the window's own large sums."""
    p = prompt()
    p.keys[:, -8:] *= 10
    scores = SnapKV(window=8).score(p, 20)
    raw = p.window_weights(8).sum(2).mean(1)[:, :-8]
    assert scores.shape[-1] == N - 8
    assert torch.equal(scores.amax(-1), raw.amax(-1))
    assert float(pool(torch.tensor([[1.0, 2.0, 6.0]]), 3, "avg")[0, 0]) == 1.5  # real neighbours only


def test_pooling_of_cached_tokens_follows_the_text_not_the_slots() -> None:
    positions = torch.tensor([[[40, 2, 41, 0, 44, 1]]])
    scores = torch.tensor([[[1.0, 5.0, 3.0, 2.0, 9.0, 4.0]]])
    assert pool_cached(scores, positions, 3).tolist() == [[[3, 5, 3, 4, 9, 5]]]
    assert pool_cached(scores, positions, 7).tolist() == [[[3, 5, 9, 5, 9, 5]]]
    assert pool_cached(scores[..., :1], positions[..., :1], 7).tolist() == [[[1]]]


def test_lowest_slot() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    protected = torch.tensor([[False, True, False], [True, False, False]])
    assert lowest_slot(scores, protected).tolist() == [2, 2]


EVERY: list[Policy] = [Full(), StreamingLLM(), H2O(), SnapKV(), AhaKV(), AhaKV(score_pool=7, sinks=4)]


@pytest.mark.parametrize("policy", EVERY, ids=repr)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 39, 40, 41, 120])
def test_kept_positions_are_ascending_distinct_and_within_budget(policy: Policy, n: int) -> None:
    p = prompt(n=n)
    kept = policy.keep_prompt(p, 40)
    size = min(40, n) if policy.uses_budget else n
    assert kept.shape == (KV_HEADS, size) and kept.dtype == torch.int64
    assert (kept[:, 1:] > kept[:, :-1]).all()
    assert kept.min() == 0 or n > 40
    assert (kept[:, -1] == n - 1).all()
    state = policy.start(p, kept, 40)
    assert all(tensor.shape[0] == KV_HEADS and tensor.shape[-1] == size for tensor in state.slots.values())


@pytest.mark.parametrize("budget", [5, 12, N - 1, N, N + 9])
@pytest.mark.parametrize("sinks", [0, 4])
def test_streaming_llm_keeps_what_its_order_says(sinks: int, budget: int) -> None:
    p, policy = prompt(), StreamingLLM(sinks=sinks)
    assert torch.equal(policy.keep_prompt(p, budget), RankedPolicy.keep_prompt(policy, p, budget))


def test_heads_choose_for_themselves_except_in_streaming_llm() -> None:
    p = prompt()
    for policy in (H2O(), SnapKV(), AhaKV()):
        kept = policy.keep_prompt(p, 40)
        assert not torch.equal(kept[0], kept[1])
    assert StreamingLLM().keep_prompt(p, 10).tolist() == [[0, 1, 2, 3, *range(N - 6, N)]] * 2


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (AhaKV, {"group": "median"}, "group=median"),
        (AhaKV, {"gain_guard": "none"}, "gain_guard=none"),
        (AhaKV, {"decode_score": 3}, "decode_score=3"),
        (AhaKV, {"window": 0}, "window=0"),
        (AhaKV, {"window": 2.5}, "window=2.5"),
        (AhaKV, {"value_pool": 4}, "value_pool=4"),
        (AhaKV, {"value_pool": 0}, "value_pool=0"),
        (AhaKV, {"window": 2}, "value_pool=5"),
        (AhaKV, {"score_pool": 6}, "score_pool=6"),
        (AhaKV, {"step_gain": "yes"}, "step_gain=yes"),
        (AhaKV, {"sinks": -1}, "sinks=-1"),
        (AhaKV, {"decay": math.nan}, "decay=nan"),
        (H2O, {"heavy_share": 1.5}, "heavy_share=1.5"),
        (H2O, {"heavy_share": -0.1}, "heavy_share=-0.1"),
        (SnapKV, {"kernel": 4}, "kernel=4"),
        (SnapKV, {"window": 0}, "window=0"),
        (SnapKV, {"pooling": "median"}, "pooling=median"),
        (StreamingLLM, {"positions": "absolute"}, "positions=absolute"),
        (StreamingLLM, {"sinks": -4}, "sinks=-4"),
    ],
)
def test_invalid_settings_are_named(kind: type[Policy], settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        kind(**settings)
    assert "valid" in str(error.value) and "\n" not in str(error.value)
