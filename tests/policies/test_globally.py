"""One competition of all layers and heads: beside all other budgets, and what is in memory while the layers come."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.base import RankedPolicy
from policies.kvzip import Globally
from policies.snapkv import SnapKV
from src.engine.cut import PlannedCut
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from src.kv.plan import Allotment
from src.kv.prompt import PromptAttention
from tests.support import naive
from tests.support.allotting import counts_of, prompts, random_scores
from tests.support.tiny import tiny, tokens

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", torch.float64)


def run(model: Any, request: Request, *variants: Variant) -> list[Generation]:
    done = {generation.variant: generation for generation in Engine(model, 64).run([Job(request, variants)])}
    return [done[variant] for variant in variants]


def total_score(scores: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> float:
    """Of what the heads keep; what always stays counts for nothing."""
    total = 0.0
    for layer, heads in zip(scores, counts, strict=True):
        for row, count in zip(layer, heads, strict=True):
            best = row.sort(descending=True).values[:count]
            total += float(best[best < torch.inf].sum())
    return total


@pytest.mark.parametrize("always", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_no_other_budgets_keep_more(seed: int, always: int) -> None:
    """All that there are, for two layers of two heads; whole-number scores, so that some are equal."""
    a = Allotment(always + 2, 5, 2, 2, always)
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 9, (2, 5), generator=draw).float() for _ in range(2)]
    for layer in scores:
        layer[:, :always] = torch.inf
    counts = counts_of(Globally(), a, scores)
    best = max(
        total_score(scores, (heads[:2], heads[2:]))
        for heads in product(range(always + 1, 6), repeat=4)
        if sum(heads) == a.total
    )
    assert total_score(scores, counts) == best


@pytest.mark.parametrize("seed", range(20))
def test_what_goes_early_would_have_gone_anyway(seed: int) -> None:
    """The counts are those of one competition after the last layer, ties as promised; memory stays bounded."""
    draw = random.Random(seed)
    n, always = draw.randint(6, 30), draw.randint(0, 3)
    a = Allotment(draw.randint(always + 1, n - 1), n, draw.randint(1, 5), draw.randint(1, 3), always)
    scores = [(s * 10).round() for s in random_scores(a, seed)]
    places = []
    for layer, rows in enumerate(scores):
        for head, row in enumerate(rows.tolist()):
            ordered = sorted(row, reverse=True)[always + 1 :]
            places += [(-score, layer, rank, head) for rank, score in enumerate(ordered)]
    expected = [[always + 1] * a.kv_heads for _ in range(a.layers)]
    for _, layer, _, head in sorted(places)[: a.total - (always + 1) * a.layers * a.kv_heads]:
        expected[layer][head] += 1
    assert counts_of(Globally(), a, scores) == expected

    plan, held = Globally().plan(a), dict[int, int]()
    for p, worth in zip(prompts(a), scores, strict=True):
        assert sum(held.values()) + a.length * a.kv_heads <= a.total + a.length * a.kv_heads
        held |= {layer: sum(counts) for layer, counts in plan.cut(p, worth).items()}


def test_a_head_without_score_keeps_one() -> None:
    a = Allotment(5, 30, 2, 2, 2)
    scores = [torch.rand(2, 30) for _ in range(2)]
    scores[1][0] = 0.0
    for layer in scores:
        layer[:, -2:] = torch.inf
    assert counts_of(Globally(), a, scores)[1][0] == 3


@pytest.mark.parametrize("length", [1, 5, 12])
def test_a_short_prompt_is_kept_whole(length: int) -> None:
    a = Allotment(12, length, 3, 2, 4)
    assert counts_of(Globally(), a, [torch.zeros(2, length)] * 3) == [[length] * 2] * 3


def test_it_goes_with_other_scores(llama: Any) -> None:
    window, request = SnapKV(window=4), Request("x", tokens(50)[0].tolist(), frozenset(), 4)
    alone, together = run(llama, request, Variant(window, 12), Variant(replace(window, allocate=Globally()), 12))
    held = [int((head >= 0).sum()) for layer in together.kept_prompt for head in layer]
    assert sum(held) == 12 * 4 and min(held) >= 5 and len(set(held)) > 1
    assert all({46, 47, 48, 49} <= set(head.tolist()) for layer in together.kept_prompt for head in layer)
    assert together.kv_bytes == alone.kv_bytes


@dataclass(frozen=True)
class ByValue(RankedPolicy):
    """A token is worth what its value's first number says."""

    def rank_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        return prompt.values[..., 0]


def test_memory_while_the_layers_come() -> None:
    """Each layer padded to its longest head, the newest one whole for a moment: far below all prompts together."""
    a = Allotment(10, 60, 12, 2)
    seen, plan, held = prompts(a), Globally().plan(a), dict[int, Sequence[int]]()
    cut = PlannedCut(ByValue(allocate=Globally()), a.budget, seen[0])
    entry, most = 2 * seen[0].keys.shape[-1] * 8, 0
    for p in seen:
        held |= plan.cut(p, p.values[..., 0])
        most = max(most, sum(max(counts) * a.kv_heads for counts in held.values()))
        assert sum(map(sum, held.values())) <= a.total
        cut.add_layer(p)
    assert cut.peak_nbytes == most * entry
    assert cut.peak_nbytes < 0.3 * a.layers * a.kv_heads * a.length * entry
    assert [len(one.cache.held(0)) for one in cut.finish()] == [2] * 12


def test_a_budget_of_nothing_but_what_stays() -> None:
    with pytest.raises(ValueError, match=r"budget=8: layer 0.* valid: 9 or more"):
        Globally().plan(Allotment(8, 100, 2, 2, 8))
