"""PyramidKV's budgets: lower layers keep more (Cai et al. 2024, arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import ClassVar, Literal

from policies.parts import Allocator
from src.kv.plan import Allotment, Plan
from src.kv.shares import ByLayer, competing, fill


@dataclass(frozen=True)
class Pyramid(Allocator):
    """A budget that falls from layer to layer by the same step; PyramidKV is this beside SnapKV.

        k_l = k_0 - l (k_0 - k_{L-1}) / (L - 1),   k_{L-1} = b / beta,   k_0 = 2 b - k_{L-1},   b = C - w

    entries beside the w that always stay, C the budget. Where k_0 is more than the n - w tokens that compete, it is
    n - w and k_{L-1} = 2 b - k_0. A prompt of n <= C tokens is kept whole, one of n < 2 b gets C in every layer.
    Every layer is told its own count, so that a policy whose window is a part of its budget has another in each.

    Args:
        beta: how steep, 1 or more; 1 is uniform. 20 in the paper's runs.
        rounding: "exact": k_l is rounded down and what is missing goes to the first layers, so that the counts add up
            to the budget (ours); "official": b / beta and the step are whole-number divisions, as in the authors'
            code, which keeps 4.6 % too much at C = 128 (L = 32, w = 8); "kvpress": C in place of b, k_l counts the
            window in and is rounded to the nearest; uniform unless n >= k_0 >= k_{L-1} >= w.

    A layer keeps one entry at least beside its window, whatever the rounding (ours): k_{L-1} is 1 where b < beta.
    """

    beta: float = 20
    rounding: Literal["exact", "official", "kvpress"] = "exact"
    evenhanded: ClassVar[bool] = True
    by_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta={self.beta}: valid: a number, 1 or more")

    @property
    def exact(self) -> bool:
        return self.rounding == "exact"

    def plan(self, allotment: Allotment) -> Plan:
        if allotment.budget >= allotment.length:
            return ByLayer.uniform(allotment)
        divided = {"exact": self._exact, "official": self._official, "kvpress": self._kvpress}[self.rounding]
        least = allotment.budget - competing(allotment) + 1
        counts = [max(count, least) for count in divided(allotment)]
        return ByLayer(counts, allotment.kv_heads)

    def _exact(self, a: Allotment) -> list[int]:
        free, most = a.budget - a.always, a.length - a.always
        if a.length < 2 * free or a.layers == 1:
            return [a.budget] * a.layers
        high, low = ends(2 * free, max(Fraction(1), free / Fraction(self.beta)), most)
        beside = [floor(high - layer * (high - low) / (a.layers - 1)) for layer in range(a.layers)]
        beside = fill(beside, free * a.layers, [most] * a.layers, range(a.layers))
        return [a.always + count for count in beside]

    def _official(self, a: Allotment) -> list[int]:
        free, most = a.budget - a.always, a.length - a.always
        if a.length < 2 * free or a.layers == 1:
            return [a.budget] * a.layers
        high, low = ends(2 * free, Fraction(free // Fraction(self.beta)), most)
        step = (high - low) // (a.layers - 1)
        return [a.always + int(high) - layer * step for layer in range(a.layers)]

    def _kvpress(self, a: Allotment) -> list[int]:
        most, low = float(a.length - a.always), a.budget / self.beta
        high = 2 * a.budget - low
        if high >= most:
            high, low = most, 2 * a.budget - most
        if not a.length >= high >= low >= a.always or a.layers == 1:
            return [a.budget] * a.layers
        step = (high - low) / (a.layers - 1)  # in floating point, as there: ties are rounded alike
        return [round(high - layer * step) for layer in range(a.layers)]


def ends(both: int, low: Fraction, most: int) -> tuple[Fraction, Fraction]:
    """The first and the last layer's entries, which add up to `both`: the first may hold `most`."""
    high = min(both - low, Fraction(most))
    return high, both - high
