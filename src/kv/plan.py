"""Who may hold how many entries: what an allocator is told, and the plan that it makes for one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention


@dataclass(frozen=True)
class Allotment:
    """What there is to divide.

    Attributes:
        budget: entries per layer and KV head, on average over all of them.
        length: prompt tokens.
        layers, kv_heads: of the model.
        always: entries that the policy keeps in every head whatever their score (its most recent tokens, first
            tokens), however few it is told; a head never gets fewer than one more.
        at_budget: the same where the policy is told `budget`: more, if its window is a part of the budget.
    """

    budget: int
    length: int
    layers: int
    kv_heads: int
    always: int = 0
    at_budget: int = 0

    @property
    def total(self) -> int:
        """Entries of all layers and KV heads together: a head cannot hold more than the prompt."""
        return min(self.budget, self.length) * self.layers * self.kv_heads

    def told_alike(self) -> Allotment:
        """The same for a plan that tells every layer the budget, whatever it gives: `always` is what stays then."""
        return replace(self, always=max(self.always, self.at_budget))


class Plan(Protocol):
    """One request's allotment. Rankings are nested: the best of a smaller count are among the best of a larger one.

    Attributes:
        revises: a layer's counts may still fall when later layers come.
    """

    @property
    def revises(self) -> bool: ...

    def told(self, layer: int) -> int:
        """Entries per KV head that a policy is told before a layer's scores are known (`budget` of its hooks)."""

    def cut(self, prompt: PromptAttention, scores: Tensor) -> Mapping[int, Sequence[int]]:
        """Entries of every KV head, of this layer and of every earlier one that is to shrink now.

        A layer that has no entry yet keeps its whole prompt until it has one; after the last layer all must have one.

        Args:
            scores: `(kv_heads, n)`, float32; infinity: stays (as often as `always` says); the lowest leaves first.

        Returns:
            layer -> a count for each KV head, at least one and at most `length`; never more than it had.
        """
