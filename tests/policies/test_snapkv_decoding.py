"""SnapKV with `decode_eviction`, the unified baseline that SCOPE is compared with, against naive lists."""

from typing import Any

import pytest
import torch

from policies.ahakv import AhaKV
from policies.snapkv import SnapKV
from src.engine.request import Variant
from tests.policies.test_scope import run, sort
from tests.support import naive
from tests.support.naive import Naive, pooled, top
from tests.support.tiny import tiny

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

POLICIES = [
    SnapKV(window=6, kernel=1, decode_eviction=True),
    SnapKV(window=6, decode_eviction=True),
    SnapKV(window=6, kernel=5, pooling="avg", decode_eviction=True),
    SnapKV(window=6, kernel=5, group="max", decode_eviction=True),
]


class Evicting(SnapKV):
    """For the naive implementation, which asks the class."""

    evicts_while_decoding = True


class NaiveSnapKV(Naive):
    def drop(self, layer: int, g: int) -> int:
        policy: Any = self.policy
        there = [t.position for t in self.cached[layer][g]]
        scores = {j: self.score(layer, g, j) for j in there if j <= self.position - policy.window}
        scores = pooled(scores, policy.kernel, policy.pooling)
        stay = top(scores, len(scores) - 1, self.hint(self.step, layer, g)) if len(scores) > 1 else []
        return next(j for j in scores if j not in stay)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", torch.float64)


@pytest.mark.parametrize("n", [40, 9, 3])
def test_like_naive_lists(model: Any, n: int) -> None:
    results = run(model, [Variant(policy, 15) for policy in POLICIES], new=41, n=n)
    for generation, history in results:
        policy: Any = generation.variant.policy
        settings = {name: getattr(policy, name) for name in ("window", "kernel", "pooling", "group")}

        def hint(step: int, layer: int, head: int, history: Any = history) -> set[int]:
            return set(history[step][layer][head])

        expected = NaiveSnapKV(model, Evicting(**settings), 15, hint).run(generation.request.ids, 41)
        for step, (mine, theirs) in enumerate(zip(history, expected.kept, strict=True)):
            assert mine == theirs, f"{policy}: kept positions differ after step {step}"
        assert generation.tokens == expected.tokens
        assert {len(head) for layer in history[-1] for head in layer} == {15}


def test_is_ahakv_without_its_gain_and_value_prior(model: Any) -> None:
    """Another road to the same policy."""
    plain = AhaKV(window=6, step_gain=False, value_prior=False, score_pool=7)
    variants = [Variant(SnapKV(window=6, decode_eviction=True), 15), Variant(plain, 15)]
    (snap, _), (aha, _) = run(model, variants, new=60, n=40)
    assert snap.tokens == aha.tokens
    assert [sort(layer) for layer in snap.kept_prompt] == [sort(layer) for layer in aha.kept_prompt]


def test_off_by_default() -> None:
    assert SnapKV().limit(100, 100) is None and SnapKV(decode_eviction=True).limit(100, 100) == 100
