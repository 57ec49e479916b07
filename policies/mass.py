"""No budget, but a part of what the scores add up to: each head holds as many tokens as that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from policies.parts import Allocator
from src.kv.plan import Allotment, Plan

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention


@dataclass(frozen=True)
class Mass(Allocator):
    """Every head holds the fewest tokens whose scores add up to `tau` of all that compete, and what always stays.

    Ours; with attention for scores it is the rule by which ZipVL (arXiv 2410.08584) counts tokens, there for a layer.
    The budget decides nothing but what a policy makes of it (a window that is a part of it), and the counts add up to
    what the prompt needs: compare at the achieved number of entries. For scores that are not negative.

    Args:
        tau: above 0, at most 1, which keeps all tokens with a score above 0. A head keeps one at least.
    """

    tau: float = 0.95
    evenhanded: ClassVar[bool] = True
    uses_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau={self.tau}: valid: a number above 0, at most 1")

    @property
    def exact(self) -> bool:
        return False

    def plan(self, allotment: Allotment) -> Plan:
        return ByMass(self, min(allotment.budget, allotment.length))

    def counts(self, scores: Tensor) -> Tensor:
        """Entries of each head, `(kv_heads,)`, for scores `(kv_heads, n)`; infinity: stays."""
        stays = scores.isposinf()
        ordered = scores.masked_fill(stays, 0.0).double().sort(dim=-1, descending=True).values
        mass = ordered.cumsum(dim=-1)
        needed = 1 + (mass < self.tau * mass[:, -1:]).sum(dim=-1)
        return (needed + stays.sum(dim=-1)).clamp_max(scores.shape[-1])


@dataclass(frozen=True)
class ByMass:
    """One request's."""

    rule: Mass
    budget: int
    revises: ClassVar[bool] = False

    def told(self, layer: int) -> int:
        return self.budget

    def cut(self, prompt: PromptAttention, scores: Tensor) -> dict[int, list[int]]:
        found: list[int] = self.rule.counts(scores).tolist()
        return {prompt.layer: found}
