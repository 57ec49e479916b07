"""Whole numbers that add up: what allocators have in common when they divide a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from src.kv.plan import Allotment

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention

SMALLEST = 1e-200  # what a share of nothing counts as, so that those who have nothing are served alike
SCALES = (-1000.0, 1000.0)  # powers of two by which shares are multiplied: every one that is right lies between them


@dataclass(frozen=True)
class ByLayer:
    """A plan that is known before the prompt is read: one count for all KV heads of a layer."""

    counts: Sequence[int]
    kv_heads: int
    revises: ClassVar[bool] = False

    @classmethod
    def uniform(cls, allotment: Allotment) -> ByLayer:
        """The budget everywhere, or the whole prompt where that is less."""
        return cls([min(allotment.budget, allotment.length)] * allotment.layers, allotment.kv_heads)

    def told(self, layer: int) -> int:
        return self.counts[layer]

    def cut(self, prompt: PromptAttention, scores: Tensor) -> dict[int, list[int]]:
        return {prompt.layer: [self.counts[prompt.layer]] * self.kv_heads}


def competing(allotment: Allotment) -> int:
    """Entries of a KV head beside those that always stay, on average.

    Raises:
        ValueError: not even one.
    """
    if allotment.budget <= allotment.always:
        raise ValueError(
            f"budget={allotment.budget}: layer 0, head 0 would hold nothing but the {allotment.always} tokens that "
            f"always stay; valid: {allotment.always + 1} or more"
        )
    return allotment.budget - allotment.always


def shrinking(now: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """What a plan answers: the layers that have other counts than before, and those that had none."""
    return {
        layer: list(counts)
        for layer, counts in enumerate(now)
        if layer >= len(before) or list(counts) != list(before[layer])
    }


def fill(counts: Sequence[int], total: int, most: Sequence[int], order: Iterable[int]) -> list[int]:
    """`counts` with one more for each of `order` that has not reached its `most`, again and again up to `total`."""
    filled, order = list(counts), list(order)
    missing = min(total, sum(most)) - sum(filled)
    while missing > 0:
        open_ones = [i for i in order if filled[i] < most[i]][:missing]
        for i in open_ones:
            filled[i] += 1
        missing -= len(open_ones)
    return filled


def rounded(amounts: Sequence[float | Fraction], most: Sequence[int]) -> list[int]:
    """Whole numbers in place of amounts that add up to one: those with the largest remainders are rounded up.

    What is above `most` goes to the others, in equal parts. Ties: the first.
    """
    low = [min(floor(amount), cap) for amount, cap in zip(amounts, most, strict=True)]
    order = sorted(range(len(low)), key=lambda i: floor(amounts[i]) - amounts[i])
    return fill(low, round(sum(amounts)), most, order)


def apportioned(shares: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """Whole numbers that add up to `total`, each from `least` to `most`, in proportion to `shares`.

    Each is the share times one common factor, rounded to the nearest and kept within its bounds (Webster's method):
    entry number k + 1 goes where share / (k + 1/2) is largest, ties: fewer entries, then the first. Whoever joins takes
    entries from this order, so that nobody who was there before gets more; with largest remainders some would (the
    "new states" paradox), and what was thrown away cannot be had back.
    """
    shares = [max(share, SMALLEST) for share in shares]
    total = min(total, most * len(shares))

    def at(power: float) -> list[int]:
        factor = 2.0**power
        return [max(least, ceil(min(most, factor * share) - 0.5)) for share in shares]

    low, high = SCALES
    for _ in range(50):  # far enough that what is missing is few
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle)
    counts = at(low)
    for _ in range(total - sum(counts)):
        open_ones = [i for i, count in enumerate(counts) if count < most]
        counts[min(open_ones, key=lambda i: (-shares[i] / (counts[i] + 0.5), counts[i]))] += 1
    return counts
