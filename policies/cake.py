"""CAKE: tokens that are attended to, or now and then, and layers by how their attention spreads and shifts (Qin et al.
2025, arXiv 2503.12491)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from policies.base import ScorePolicy
from policies.parts import Allocator
from policies.snapkv import pool
from src.kv.plan import Allotment, Plan
from src.kv.shares import ByLayer, apportioned, competing, shrinking

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention


@dataclass(frozen=True)
class CAKE(ScorePolicy):
    """Keep the window and the tokens with a high mean, or a varying, attention of it; nothing leaves while decoding.

        s_j = mean over the group of avgpool( mean_i a_ij + gamma var_i a_ij ),  i over the last w rows,  j < n - w

    As in the authors' code, but for two things: averages at the ends count real neighbours only (there: zeros, too),
    and the cache grows by one entry per generated token (there: each step ranks by its own row and keeps the layer's
    size). Its budgets are `Cascade`'s.

    Args:
        window: w, the observation window, always kept; 32 in the authors' runs.
        gamma: weight of the variance (unbiased), 200 there.
        kernel: width of the average pooling along the prompt, 5 there; 1 switches it off.
    """

    window: int = 32
    gamma: float = 200.0
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2 or self.kernel % 2 == 0:
            raise ValueError(f"window={self.window}, kernel={self.kernel}: valid: a window of 2 or more, an odd kernel")

    def recent(self, budget: int) -> int:
        return self.window

    def least_budget(self) -> int:
        return self.window + 1

    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        rows = prompt.window_weights(self.window)[..., : prompt.length - self.window]
        worth = rows.mean(dim=2) + self.gamma * rows.var(dim=2)
        return pool(worth.mean(dim=1), self.kernel, "avg")


@dataclass(frozen=True)
class Cascade(Allocator):
    """A budget divided in proportion to each layer's preference, anew after every layer: earlier ones shrink.

        P_l = H_l^(1 / tau1) V_l^(1 / tau2),   k_l = w + (C - w) L P_l / sum over the layers seen so far of P
        H_l = - sum a_ij log a_ij,   V_l = sum var_i a_ij,   both over query heads and j < n - r, i the last r rows

    for C entries per layer and head on average and w that always stay. So the first layers start with nearly
    everything, and there are never more entries than the budget's and one layer's prompt. What the last layer leaves
    is what one would give all layers at once, which the authors' code misses where a layer is capped: there the
    surplus is spread equally, and a layer may get more than it still has.

    From 1 to n - w entries beside those that stay; rounded to the nearest with one factor for all layers, so that
    the counts add up and only fall (ours: `src.kv.shares.apportioned`). All KV heads of a layer hold the same. The
    rule's other half, which token a decoding step drops, is not here.

    Args:
        window: r, rows that H and V look at; 32 in the authors' runs.
        tau1, tau2: temperatures. The authors give a pair for each model and budget, this one for Llama-3.1-8B at
            1024; there at 128: 1.6, 0.6. Mistral-7B-v0.3: 0.8, 0.5 and 1.0, 0.8; Qwen2.5-7B: 1.5, 0.6 and 0.4, 0.6;
            Llama-2-7B: 1.9, 1.8 and 0.9, 2.3.
    """

    window: int = 32
    tau1: float = 1.6
    tau2: float = 0.4
    evenhanded: ClassVar[bool] = True
    by_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2 or min(self.tau1, self.tau2) <= 0:
            raise ValueError(
                f"window={self.window}, tau1={self.tau1}, tau2={self.tau2}: valid: a window of 2 or more, tau above 0"
            )

    @property
    def revises(self) -> bool:
        return True

    def plan(self, allotment: Allotment) -> Plan:
        if allotment.budget >= allotment.length:
            return ByLayer.uniform(allotment)
        allotment = allotment.told_alike()
        return Cascading(self, allotment, competing(allotment))

    def preference(self, prompt: PromptAttention) -> float:
        """P of a layer; 0 where it is no number (the scores are none either, and the engine refuses them)."""
        rows = min(self.window, prompt.length - 1)
        weights = prompt.window_weights(rows)[..., : prompt.length - rows]
        entropy = -(weights * (weights + 1e-10).log()).sum()
        shift = weights.var(dim=2, correction=int(rows > 1)).sum()
        found = (entropy.clamp_min(0).double() ** (1 / self.tau1) * shift.double() ** (1 / self.tau2)).item()
        return found if math.isfinite(found) else 0.0


@dataclass
class Cascading:
    """One request's: the preferences of the layers seen so far, and what they hold.

    Args:
        beside: entries of a KV head beside those that always stay, on average.
    """

    rule: Cascade
    allotment: Allotment
    beside: int
    preferences: list[float] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    revises: ClassVar[bool] = True

    def told(self, layer: int) -> int:
        return self.allotment.budget

    def cut(self, prompt: PromptAttention, scores: Tensor) -> dict[int, list[int]]:
        a = self.allotment
        self.preferences.append(self.rule.preference(prompt))
        beside = apportioned(self.preferences, self.beside * a.layers, 1, a.length - a.always)
        before, self.counts = self.counts, [[a.always + count] * a.kv_heads for count in beside]
        return shrinking(self.counts, before)
