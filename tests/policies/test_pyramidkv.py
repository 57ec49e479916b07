"""PyramidKV's budgets by layer, beside the formulas written out as loops."""

import random
from itertools import pairwise

import pytest

from policies.pyramidkv import Pyramid
from src.kv.plan import Allotment
from tests.support.allotting import counts_of


def by_layer(pyramid: Pyramid, n: int, budget: int, window: int, layers: int, kv_heads: int = 2) -> list[int]:
    """One count a layer: the plan's, the same for all KV heads and what the layer was told."""
    a = Allotment(budget, n, layers, kv_heads, window)
    found = counts_of(pyramid, a)
    assert all(len(set(heads)) == 1 for heads in found)
    plan = pyramid.plan(a)
    assert [plan.told(layer) for layer in range(layers)] == [heads[0] for heads in found]
    return [heads[0] for heads in found]


def line(n: int, budget: int, window: int, layers: int, beta: float) -> list[float]:
    """The paper's k_l, window included, not rounded."""
    free = budget - window
    if n < budget:
        return [n] * layers
    if n < 2 * free or layers == 1:
        return [budget] * layers
    low = max(1.0, free / beta)
    high = 2 * free - low
    if high >= n - window:
        high = n - window
        low = 2 * free - high
    return [window + high - layer * (high - low) / (layers - 1) for layer in range(layers)]


def cases(seed: int, count: int) -> list[tuple[int, int, int, int, float]]:
    """n, budget, window, layers, beta: many at the edges between the branches."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        window, layers, beta = draw.choice([0, 1, 8, 32]), draw.randint(1, 40), draw.choice([1, 1.5, 2, 7, 20, 1e6])
        budget = window + draw.choice([1, 2, 19, 20, 56, 120, draw.randint(1, 300)])
        free = budget - window
        near = [budget - 1, budget, budget + 1, 2 * free - 1, 2 * free, 2 * free + window - int(free / beta)]
        n = max(1, draw.choice([*near, draw.randint(budget, 12 * budget)]))
        found.append((n, budget, window, layers, beta))
    return found


@pytest.mark.parametrize(("n", "budget", "window", "layers", "beta"), cases(0, 60))
def test_exact_is_the_line_and_adds_up(n: int, budget: int, window: int, layers: int, beta: float) -> None:
    """`counts_of` asserts the total."""
    found = by_layer(Pyramid(beta), n, budget, window, layers)
    ideal = line(n, budget, window, layers, beta)
    assert all(-1e-6 < ideal_count - count + 1 < 2 for count, ideal_count in zip(found, ideal, strict=True))
    assert found == sorted(found, reverse=True)
    rounded_up = [count > ideal_count + 1e-6 for count, ideal_count in zip(found, ideal, strict=True)]
    below_cap = [up for up, count in zip(rounded_up, ideal, strict=True) if count < n - 1e-6]
    assert below_cap == sorted(below_cap, reverse=True), "what is missing goes to the first layers"


def test_the_ends() -> None:
    found = by_layer(Pyramid(), 4096, 128, 8, 32)
    assert found[0] == 8 + 234 + 1 and found[-1] == 8 + 6  # one of those that rounding down had left
    assert by_layer(Pyramid(1), 4096, 128, 8, 32) == [128] * 32
    steep = by_layer(Pyramid(1e9), 4096, 128, 8, 32)
    assert steep[-1] == 8 + 1 and steep[0] == 8 + 239 + 1  # never below one beside the window


@pytest.mark.parametrize("rounding", ["exact", "official", "kvpress"])
def test_branches(rounding: str) -> None:
    pyramid = Pyramid(rounding=rounding)  # type: ignore[arg-type]
    assert by_layer(pyramid, 127, 128, 8, 4) == [127] * 4  # n < C: all of it
    assert by_layer(pyramid, 128, 128, 8, 4) == [128] * 4
    if rounding != "kvpress":
        assert by_layer(pyramid, 239, 128, 8, 4) == [128] * 4  # n < 2 b = 240: uniform
        assert by_layer(pyramid, 240, 128, 8, 4)[0] == 240  # k_0 = n - w: the whole prompt in the first layer
        last = 232 - 3 * ((232 - 8) // 3) if rounding == "official" else 240 - 232
        assert by_layer(pyramid, 240, 128, 8, 4)[-1] == 8 + last
    assert by_layer(pyramid, 4096, 128, 8, 1) == [128]  # one layer: no step to divide by
    assert by_layer(pyramid, 4096, 400, 8, 4, kv_heads=1)[0] > 700


@pytest.mark.parametrize(
    ("budget", "first", "last", "too_much"), [(64, 110, 17, 13.4), (128, 234, 17, 4.6), (512, None, None, 2.8)]
)
def test_official_overshoots_as_the_authors_code(
    budget: int, first: int | None, last: int | None, too_much: float
) -> None:
    found = [count - 8 for count in by_layer(Pyramid(rounding="official"), 8000, budget, 8, 32)]
    assert first is None or (found[0], found[-1]) == (first, last)
    assert len({high - low for high, low in pairwise(found)}) == 1
    assert 100 * sum(found) / (32 * (budget - 8)) - 100 == pytest.approx(too_much, abs=0.05)
    assert not Pyramid(rounding="official").exact and Pyramid().exact


@pytest.mark.parametrize(("n", "budget", "window", "layers", "beta"), cases(1, 40))
def test_official_in_whole_numbers(n: int, budget: int, window: int, layers: int, beta: float) -> None:
    free = budget - window
    if n <= budget or n < 2 * free or layers == 1:
        wanted = [min(n, budget)] * layers
    else:
        low = int(free // beta)
        high = 2 * free - low
        if high >= n - window:
            high, low = n - window, 2 * free - (n - window)
        wanted = [max(1, high - layer * ((high - low) // (layers - 1))) + window for layer in range(layers)]
    assert by_layer(Pyramid(beta, "official"), n, budget, window, layers) == wanted


@pytest.mark.parametrize(("n", "budget", "window", "layers", "beta"), cases(2, 40))
def test_kvpress_counts_the_window_in(n: int, budget: int, window: int, layers: int, beta: float) -> None:
    low = budget / beta
    high = 2 * budget - low
    if high >= n - window:
        high, low = n - window, 2 * budget - (n - window)
    if n <= budget or not n >= high >= low >= window or layers == 1:
        wanted = [min(n, budget)] * layers
    else:
        wanted = [max(window + 1, round(high - layer * ((high - low) / (layers - 1)))) for layer in range(layers)]
    assert by_layer(Pyramid(beta, "kvpress"), n, budget, window, layers) == wanted


def test_kvpress_by_hand() -> None:
    """n = 1000, a quarter kept, window 8, three layers: from 488 to 12 by 237.5."""
    found = by_layer(Pyramid(rounding="kvpress"), 1000, 250, 8, 3)
    assert found == [488, 250, 12]  # 487.5, 250, 12.5: halves go to the even number
    assert by_layer(Pyramid(rounding="kvpress"), 1000, 250, 13, 3) == [250] * 3  # 12.5 would not hold the window


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"beta=0.5: valid: a number, 1 or more"):
        Pyramid(beta=0.5)
    with pytest.raises(ValueError, match=r"rounding=up: valid: exact, official, kvpress"):
        Pyramid(rounding="up")  # type: ignore[arg-type]
    for rounding in ("exact", "official", "kvpress"):
        with pytest.raises(ValueError, match=r"budget=8: layer 0.* 8 tokens .* valid: 9 or more"):
            Pyramid(rounding=rounding).plan(Allotment(8, 100, 4, 2, 8))
        assert by_layer(Pyramid(rounding=rounding), 100, 9, 8, 1) == [9]
