"""Ada-KV's budgets: a layer's entries go to the heads whose scores are highest (Feng et al. 2024, arXiv 2407.11550)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from policies.parts import Allocator
from src.kv.plan import Allotment, Plan
from src.kv.shares import ByLayer, competing, rounded

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention


@dataclass(frozen=True)
class AdaKV(Allocator):
    """One competition of all heads of a layer, above a floor; Ada-KV is this beside SnapKV.

    Of a layer's H b entries beside those that always stay, f_h go to the tokens of head h that are among the H b
    best of all heads, and the head holds

        k_h = (1 - floor) f_h + floor b

    Args:
        floor: part of a head's b entries that no other head can take: 0 is the competition alone, which keeps the
            largest sum of scores that is possible, and 1 is uniform. 0.2 in the authors' runs.
        floor_rule: "mix": the formula above; "protect": the best `floor b` of every head stay and the rest competes
            for what is left (kvpress).
        rounding: "exact": the counts add up to the layer's, those with the largest remainders are rounded up (ours);
            "official": as the codes do: of "mix", floor b is rounded down and then every head to the nearest, which
            may miss H b; of "protect", the floor is a part of all that a head holds, its window counted in.
        normalise: weigh a head's scores by the part of their sum that its b best have, before they compete. For
            scores that are not negative.
        base: who divides the budget among layers; null: all hold the same. A Pyramid makes Ada-Pyramid.

    Of equal scores the better rank in its own head wins, then the first head: equal heads hold equally many. A head
    keeps one entry at least beside those that stay (ours); with "exact" that one competes with nobody.
    """

    floor: float = 0.2
    floor_rule: Literal["mix", "protect"] = "mix"
    rounding: Literal["exact", "official"] = "exact"
    normalise: bool = False
    base: Allocator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor > 1:
            raise ValueError(f"floor={self.floor}: valid: a number from 0 to 1")
        if not isinstance(self.base, Allocator | None):
            raise ValueError(
                f"base={self.base}: valid: an allocator of layers, e.g. policies.pyramidkv.Pyramid, or null"
            )
        if self.base is not None and self.base.revises:
            raise ValueError(shrinks(self.base))

    @property
    def evenhanded(self) -> bool:
        return self.base is None or self.base.evenhanded

    @property
    def exact(self) -> bool:
        whole = self.rounding == "exact" or self.floor_rule == "protect"
        return whole and (self.base is None or self.base.exact)

    def plan(self, allotment: Allotment) -> Plan:
        if allotment.budget >= allotment.length:
            return ByLayer.uniform(allotment)
        competing(allotment)
        return AdaptivePlan(self, self.base.plan(allotment) if self.base else ByLayer.uniform(allotment))

    def divide(self, scores: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Entries that the competition gives to each head, and those of them that always stay.

        Args:
            scores: `(kv_heads, n)`; infinity: stays.
            total: entries of all heads.

        Returns:
            `(kv_heads,)` twice, on the scores' device.
        """
        heads, n = scores.shape
        ordered = scores.sort(dim=-1, descending=True).values
        stays = (ordered == torch.inf).sum(dim=-1)
        free = (total - stays.sum()).double() / heads  # b
        rank = torch.arange(n, device=scores.device)
        if self.normalise:
            finite = ordered.masked_fill(ordered == torch.inf, 0.0)
            best = finite.masked_fill(rank >= stays[:, None] + free, 0.0).sum(dim=-1)
            mass = finite.sum(dim=-1)
            ordered = ordered * torch.where(mass > 0, best / mass, 1.0)[:, None]
        safe = self._safe(stays, free, total // heads)
        ordered = ordered.masked_fill(rank < safe[:, None], torch.inf)
        # Rank after rank, so that a stable order decides ties as promised.
        winners = ordered.T.flatten().sort(descending=True, stable=True).indices[:total]
        won = torch.zeros(n * heads, dtype=torch.int64, device=scores.device).index_fill_(0, winners, 1)
        return won.view(n, heads).sum(dim=0), stays

    def _safe(self, stays: Tensor, free: Tensor, whole: int) -> Tensor:
        """Entries of each head that compete with nobody, `(kv_heads,)`."""
        if self.floor_rule == "mix":
            return stays + (self.rounding == "exact")
        if self.rounding == "official":
            return (stays + 1).clamp_min(int(self.floor * whole))
        return stays + (self.floor * free).long().clamp_min(1)

    def mix(self, won: Sequence[int], stays: Sequence[int], n: int) -> list[int]:
        """k_h of the formula above, and what always stays."""
        free = Fraction(sum(won) - sum(stays), len(won))
        f = [count - stay for count, stay in zip(won, stays, strict=True)]
        if self.rounding == "exact":
            part = Fraction(str(self.floor))  # exact, so that equal remainders are equal
            beside = rounded([(1 - part) * count + part * free for count in f], [n - stay for stay in stays])
        else:
            own = int(self.floor * int(free))
            beside = [max(1, round((1 - self.floor) * count + own)) for count in f]
        return [min(stay + count, n) for stay, count in zip(stays, beside, strict=True)]


@dataclass(frozen=True)
class AdaptivePlan:
    """One request's: what `base` gives a layer, divided anew among its heads."""

    rule: AdaKV
    base: Plan
    revises: ClassVar[bool] = False

    def told(self, layer: int) -> int:
        return self.base.told(layer)

    def cut(self, prompt: PromptAttention, scores: Tensor) -> dict[int, list[int]]:
        layer = prompt.layer
        given = self.base.cut(prompt, scores)
        if set(given) != {layer}:
            raise ValueError(shrinks(self.rule.base))
        total = sum(given[layer])
        if total == scores.numel():
            return {layer: list(given[layer])}
        won, stays = torch.stack(self.rule.divide(scores, total)).tolist()  # the one wait for the device
        if sum(stays) + len(stays) > total:
            head = stays.index(max(stays))
            raise ValueError(
                f"budget: layer {layer}, head {head}: {stays[head]} tokens always stay, and there are "
                f"{total // len(stays)} entries for each head; valid: {stays[head] + 1} or more"
            )
        return {layer: won if self.rule.floor_rule == "protect" else self.rule.mix(won, stays, prompt.length)}


def shrinks(base: Allocator | None) -> str:
    """What is wrong with a base that gives layers other counts later."""
    return (
        f"base={type(base).__name__}: shrinks earlier layers, whose heads could not be divided anew; "
        "valid: an allocator that gives each layer its count once, e.g. Pyramid"
    )
