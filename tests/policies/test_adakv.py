"""Ada-KV's budgets by head, beside the formulas written out as loops."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.adakv import AdaKV
from policies.cake import Cascade
from policies.parts import Allocator
from policies.pyramidkv import Pyramid
from policies.snapkv import SnapKV
from src.kv.plan import Allotment
from tests.support.allotting import counts_of, prompts, random_scores

FLOORS = [0, 0.2, 0.29, 0.5, 1]
ALLOTMENTS = [  # budget, length, layers, kv_heads, always
    Allotment(12, 50, 2, 3, 4),
    Allotment(9, 50, 1, 4, 8),
    Allotment(49, 50, 2, 2, 8),
    Allotment(20, 21, 1, 5, 0),
    Allotment(2, 40, 3, 2, 1),
    Allotment(30, 90, 2, 1, 8),
]


def best(scores: list[list[float]], safe: int, total: int) -> list[int]:
    """How many of each head are among the `total` best, its `safe` best counted first. Scores are distinct."""
    taken = [sorted(row, reverse=True)[:safe] for row in scores]
    rest = sorted(((s, h) for h, row in enumerate(scores) for s in sorted(row, reverse=True)[safe:]), reverse=True)
    counts = [len(row) for row in taken]
    for _, head in rest[: total - sum(counts)]:
        counts[head] += 1
    return counts


def weighed(scores: list[list[float]], free: int) -> list[list[float]]:
    """Ada-KV's `normalize`."""
    return [[s * sum(sorted(row, reverse=True)[:free]) / sum(row) for s in row] for row in scores]


def naive(a: Allotment, scores: Tensor, floor: float, rule: str, rounding: str, normalise: bool) -> list[int]:
    """One layer of H (C - w) entries, from the scores of the n - w that compete; windows counted in at the end."""
    free, old = a.budget - a.always, a.length - a.always
    rows = [[float(s) for s in row if s != torch.inf] for row in scores.double()]
    rows = weighed(rows, free) if normalise else rows
    if rule == "protect":
        own = int(floor * a.budget) - a.always if rounding == "official" else int(floor * free)
        return [a.always + count for count in best(rows, max(1, own), a.kv_heads * free)]
    found = best(rows, int(rounding == "exact"), a.kv_heads * free)
    if rounding == "official":
        return [min(a.length, a.always + max(1, round(f * (1 - floor) + int(floor * free)))) for f in found]
    amounts = [f * (1 - floor) + floor * free for f in found]
    counts = [int(amount + 1e-9) for amount in amounts]
    for head in sorted(range(a.kv_heads), key=lambda h: (round(counts[h] - amounts[h], 9), h)):
        if sum(counts) < a.kv_heads * free:
            counts[head] += 1
    assert max(counts) <= old
    return [a.always + count for count in counts]


@pytest.mark.parametrize("a", ALLOTMENTS, ids=str)
@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("rule", ["mix", "protect"])
@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("normalise", [False, True])
def test_beside_loops(a: Allotment, floor: float, rule: Any, rounding: Any, normalise: bool) -> None:
    for seed in range(4):
        scores = [s.double() for s in random_scores(a, seed)]
        found = counts_of(AdaKV(floor, rule, rounding, normalise), a, scores)
        for counts, layer in zip(found, scores, strict=True):
            assert counts == naive(a, layer, floor, rule, rounding, normalise)


@pytest.mark.parametrize("rule", ["mix", "protect"])
def test_no_floor_keeps_the_largest_sum_of_scores(rule: Any) -> None:
    """Over all divisions of H b entries among two heads of six tokens, one at least for each."""
    for seed, budget, always in itertools.product(range(20), (2, 3, 4, 5), (0, 1)):
        a = Allotment(budget + always, 6 + always, 1, 2, always)
        scores = random_scores(a, seed)
        ranked = [sorted(s for s in row.tolist() if s != torch.inf)[::-1] for row in scores[0]]
        sums = {
            (k, 2 * budget - k): sum(ranked[0][:k]) + sum(ranked[1][: 2 * budget - k])
            for k in range(max(1, 2 * budget - 6), min(6, 2 * budget - 1) + 1)
        }
        found = tuple(k - always for k in counts_of(AdaKV(0, rule), a, scores)[0])
        assert sums[found] == max(sums.values())


@pytest.mark.parametrize("rule", ["mix", "protect"])
def test_uniform(rule: Any) -> None:
    a = Allotment(13, 60, 2, 3, 5)
    assert counts_of(AdaKV(1, rule), a) == [[13] * 3] * 2
    draw = torch.Generator().manual_seed(0)
    plateaus = torch.randint(0, 4, (1, 60), generator=draw).float().expand(3, -1).clone()  # ties everywhere
    plateaus[:, -5:] = torch.inf
    constant = plateaus.clamp_max(0).masked_fill(plateaus == torch.inf, torch.inf)
    for floor, rounding, normalise in itertools.product(FLOORS, ("exact", "official"), (False, True)):
        allocator: Any = AdaKV(floor, rule, rounding, normalise)
        each = 13 if allocator.exact else 5 + round(8 * (1 - floor) + int(8 * floor))  # 12 for a floor of 0.2
        assert counts_of(allocator, a, [plateaus, constant]) == [[each] * 3] * 2


def test_one_head_has_everything() -> None:
    """It gets all that the others' floors leave, and no more than there is."""
    a = Allotment(15, 100, 1, 4, 5)
    scores = torch.full((4, 100), -1.0)
    scores[2] = 1
    scores[:, -5:] = torch.inf
    assert counts_of(AdaKV(0.2, "protect"), a, [scores]) == [[7, 7, 39, 7]]
    assert counts_of(AdaKV(0), a, [scores]) == [[6, 6, 42, 6]]
    assert counts_of(AdaKV(0, rounding="official"), a, [scores]) == [[6, 6, 45, 6]]  # the code's 5, and one of ours
    short = Allotment(15, 20, 1, 4, 5)
    assert counts_of(AdaKV(0), short, [scores[:, 80:]]) == [[14, 13, 20, 13]]
    assert counts_of(AdaKV(0, "protect"), Allotment(20, 20, 1, 4, 5), [scores[:, 80:]]) == [[20] * 4]


@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("rule", ["mix", "protect"])
def test_pyramid_within(rule: Any, rounding: Any) -> None:
    """Every layer is told, and divides, what the pyramid gives it."""
    a = Allotment(24, 200, 6, 3, 8)
    base = Pyramid(5, rounding)
    allocator = AdaKV(0.2, rule, base=base)
    for seed in range(5):
        found = counts_of(allocator, a, random_scores(a, seed))
        assert [sum(heads) for heads in found] == [3 * base.plan(a).told(layer) for layer in range(a.layers)]
        assert [allocator.plan(a).told(layer) for layer in range(a.layers)] == [sum(heads) / 3 for heads in found]
    assert allocator.exact == (rounding == "exact")


def test_what_stays_may_differ_by_layer() -> None:
    """A window that is half of what a layer was told, as H2O's: the scores say what stays."""
    a = Allotment(24, 200, 4, 3, 12)
    base = Pyramid(5)
    scores = random_scores(Allotment(24, 200, 4, 3, 0))
    for layer, worth in enumerate(scores):
        worth[:, 200 - base.plan(a).told(layer) // 2 :] = torch.inf
    plan = AdaKV(0.5, base=base).plan(a)
    for layer, (prompt, worth) in enumerate(zip(prompts(a), scores, strict=True)):
        told = plan.told(layer)
        counts = plan.cut(prompt, worth)[layer]
        stay = told // 2
        assert sum(counts) == 3 * told and min(counts) >= stay + (told - stay) // 2


def test_on_snapkvs_scores() -> None:
    """Real scores with pooled plateaus; permuted heads get permuted counts where no tie decides."""
    a = Allotment(20, 120, 2, 4, 8)
    snap = SnapKV(window=8, kernel=1)
    seen = prompts(a)
    scores = [torch.cat([snap.score(p, 20), torch.full((4, 8), torch.inf)], dim=-1) for p in seen]
    turned = [s.flip(0) for s in scores]
    for rule, floor in itertools.product(("mix", "protect"), (0.25, 0.5)):
        allocator: Any = AdaKV(floor, rule, rounding="official")
        found = counts_of(allocator, a, scores, seen)
        assert [heads[::-1] for heads in found] == counts_of(allocator, a, turned, seen)
        assert all(len(set(heads)) > 1 for heads in found)


@pytest.mark.parametrize("rule", ["mix", "protect"])
@pytest.mark.parametrize("rounding", ["exact", "official"])
def test_one_wait_for_the_device(rule: Any, rounding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's numbers are read once; before that, nothing asks for a value (a meta tensor has none)."""
    allocator: Any = AdaKV(0.3, rule, rounding, normalise=True)
    won, stays = allocator.divide(torch.empty(3, 50, device="meta"), 36)
    assert won.shape == stays.shape == (3,)
    a = Allotment(12, 50, 2, 3, 4)
    scores, seen, plan, asked = random_scores(a), prompts(a), allocator.plan(a), []
    real = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: asked.append(self.shape) or real(self))
    for prompt, worth in zip(seen, scores, strict=True):
        plan.cut(prompt, worth)
    assert asked == [(2, 3)] * a.layers


def test_bad_settings() -> None:
    draw = random.Random(0)
    for floor in (1.01, 2 + draw.random()):
        with pytest.raises(ValueError, match=rf"floor={floor}: valid: a number from 0 to 1"):
            AdaKV(floor)
    with pytest.raises(ValueError, match=r"floor=-0.1: valid"):
        AdaKV(-0.1)
    with pytest.raises(ValueError, match=r"floor_rule=both: valid: mix, protect"):
        AdaKV(floor_rule="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"base=pyramid: valid: an allocator"):
        AdaKV(base="pyramid")  # type: ignore[arg-type]
    for base in (None, Pyramid()):
        with pytest.raises(ValueError, match=r"budget=8: layer 0.* valid: 9 or more"):
            AdaKV(base=base).plan(Allotment(8, 100, 2, 2, 8))


def test_what_the_scores_say_too_late() -> None:
    a = Allotment(10, 100, 1, 2, 2)
    scores = torch.zeros(2, 100)
    scores[:, 50:] = torch.inf
    with pytest.raises(ValueError, match=r"budget: layer 0, head 0: 50 tokens .* 10 entries .* valid: 51 or more"):
        counts_of(AdaKV(), a, [scores])
    base: Allocator = Cascade(window=8)
    with pytest.raises(ValueError, match=r"base=Cascade: shrinks earlier layers.*e.g. Pyramid"):
        counts_of(AdaKV(base=base), Allotment(10, 100, 3, 2, 2))
