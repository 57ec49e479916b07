"""Whole numbers that add up, beside naive loops."""

import math
import random
from itertools import pairwise

import pytest

from src.kv.plan import Allotment
from src.kv.shares import apportioned, competing, fill, rounded


def largest_remainder(amounts: list[float], most: list[int]) -> list[int]:
    counts = [min(int(amount), cap) for amount, cap in zip(amounts, most, strict=True)]
    remainder = {i: amount - int(amount) for i, amount in enumerate(amounts)}
    while sum(counts) < min(round(sum(amounts)), sum(most)):
        waiting = [i for i in remainder if counts[i] < most[i]]
        if not waiting:  # all had their turn
            remainder = {i: amounts[i] - int(amounts[i]) for i in range(len(amounts))}
            continue
        best = max(waiting, key=lambda i: (remainder[i], -i))
        counts[best] += 1
        del remainder[best]
    return counts


def test_rounded_beside_a_loop() -> None:
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randint(1, 8)
        total = draw.randint(size, 60)
        cuts = sorted(draw.uniform(0, total) for _ in range(size - 1))
        amounts = [high - low for low, high in pairwise([0, *cuts, total])]
        most = [draw.randint(math.ceil(total / size), total) for _ in range(size)]
        found = rounded(amounts, most)
        assert found == largest_remainder(amounts, most) and sum(found) == total
        free = rounded(amounts, [total] * size)
        assert all(abs(count - amount) < 1 for count, amount in zip(free, amounts, strict=True))


def test_rounded_by_hand() -> None:
    assert rounded([1.5, 2.25, 3.25], [9, 9, 9]) == [2, 2, 3]
    assert rounded([1.5, 1.5, 1.0], [9, 9, 9]) == [2, 1, 1]  # a tie: the first
    assert rounded([7.0, 1.5, 1.5], [4, 9, 9]) == [4, 3, 3]  # the surplus of the first, in equal parts
    assert rounded([0.1 + 0.2, 0.7], [1, 1]) == [0, 1]


def test_fill() -> None:
    assert fill([3, 2, 2], 9, [3, 9, 3], range(3)) == [3, 3, 3]
    assert fill([3, 2, 2], 10, [3, 9, 3], range(3)) == [3, 4, 3]
    assert fill([1, 1], 99, [2, 2], range(2)) == [2, 2]  # there is no more room


def one_by_one(shares: list[float], total: int, least: int, most: int) -> list[int]:
    """Webster's method as it is told: entry by entry to the largest share per (entries + 1/2)."""
    counts = [least] * len(shares)
    while sum(counts) < min(total, most * len(shares)):
        waiting = [i for i in range(len(shares)) if counts[i] < most]
        counts[max(waiting, key=lambda i: (shares[i] / (counts[i] + 0.5), -counts[i], -i))] += 1
    return counts


def some_shares(draw: random.Random, size: int) -> list[float]:
    kind = draw.choice(["spread", "whole", "wide"])
    if kind == "whole":  # many ties
        return [float(draw.randint(0, 3)) for _ in range(size)]
    return [draw.lognormvariate(0, 1 if kind == "spread" else 30) for _ in range(size)]


def test_apportioned_beside_a_loop() -> None:
    draw = random.Random(1)
    for _ in range(400):
        size, least = draw.randint(1, 9), draw.randint(0, 2)
        most = draw.randint(least + 1, 40)
        shares, total = some_shares(draw, size), draw.randint(least * size, most * size + 5)
        found = apportioned(shares, total, least, most)
        assert found == one_by_one(shares, total, least, most), (shares, total, least, most)
        assert all(least <= count <= most for count in found) and sum(found) == min(total, most * size)


def test_who_joins_takes_and_nobody_gains() -> None:
    """What a cascade needs: with largest remainders, or with a capped one's surplus in equal parts, somebody would."""
    draw = random.Random(2)
    for _ in range(200):
        size, budget = draw.randint(2, 12), draw.randint(1, 20)
        shares, most = some_shares(draw, size), draw.randint(budget, 4 * budget)
        before = [most] * size
        for joined in range(1, size + 1):
            now = apportioned(shares[:joined], budget * size, 1, most)
            assert all(count <= then for count, then in zip(now, before, strict=False))
            before = now


def test_apportioned_at_the_edges() -> None:
    assert apportioned([5.0], 7, 1, 9) == [7] and apportioned([0.0], 7, 1, 9) == [7]
    assert apportioned([0.0, 0.0, 0.0], 8, 1, 9) == [3, 3, 2]
    assert apportioned([0.0, 1e-180, 1e180], 12, 1, 10) == [1, 1, 10]
    assert apportioned([1e9, 1.0, 1.0], 12, 1, 4) == [4, 4, 4]
    assert apportioned([1e9, 3.0, 1.0], 12, 1, 6) == [6, 4, 2]  # a surplus goes on in proportion


def test_a_budget_below_what_stays() -> None:
    assert competing(Allotment(budget=9, length=50, layers=2, kv_heads=2, always=8)) == 1
    with pytest.raises(ValueError, match=r"budget=8: layer 0, head 0 .* the 8 tokens .* valid: 9 or more"):
        competing(Allotment(budget=8, length=50, layers=2, kv_heads=2, always=8))
