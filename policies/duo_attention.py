"""DuoAttention's budgets: few heads look far back, the others see first and latest tokens (Xiao et al. 2024,
arXiv 2410.10819)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from policies.parts import Allocator
from src.kv.plan import Allotment, Plan
from src.kv.shares import ByLayer, shrinking

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention

Pattern = Sequence[Sequence[float]]


@dataclass(frozen=True)
class RetrievalHeads(Allocator):
    """Heads that look far back (retrieval heads) hold the prompt, or nearly; all others `sinks + recent` entries.

    Which tokens a head holds is the matter of the policy beside it, by its scores: beside StreamingLLM, the other
    heads hold first and latest tokens as in the paper, beside SnapKV the `sinks + recent` that its window likes best.

    In the paper every retrieval head holds everything and their number is given. Here the budget is (ours): as few
    heads look far as can hold what the others leave, so that each has its whole prompt or nearly, in equal parts; the
    counts add up to the budget.

    How far a head looks (ours; the paper trains a gate for each):

        the part of its attention on tokens that are neither among the first `sinks` nor the `recent` latest, mean over
        the last `window` rows and the group

    which is what it would lose. Found as layers come, so that a head may lose its place to one of a later layer; equal
    ones: the earlier.

    Args:
        sinks, recent: what heads that do not look far hold: first tokens, latest tokens. 4 and 60 are ours, for small
            budgets; the paper's patterns hold several hundred.
        window: rows of the prompt that say how far a head looks.
        pattern: how far each KV head looks, a list for every layer, in place of what the prompt says, e.g. the paper's
            gates.
    """

    sinks: int = 4
    recent: int = 60
    window: int = 32
    pattern: Pattern | None = None
    reconstruction: ClassVar[str] = (
        "which heads look far is found on each prompt; the authors train a gate for every head, and their patterns are "
        "not here"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.sinks + self.recent < 1:
            raise ValueError(
                f"window={self.window}, sinks={self.sinks}, recent={self.recent}: valid: a window of 1 or more, "
                "sinks and recent of 1 or more together"
            )
        if self.pattern is not None:
            object.__setattr__(self, "pattern", numbers(self.pattern))  # settings tell cells apart: lists cannot

    @property
    def revises(self) -> bool:
        return not self.pattern

    def plan(self, allotment: Allotment) -> Plan:
        if allotment.budget >= allotment.length:
            return ByLayer.uniform(allotment)
        shape = f"{allotment.layers} lists of {allotment.kv_heads} numbers, one for each layer"
        if self.pattern and [len(layer) for layer in self.pattern] != [allotment.kv_heads] * allotment.layers:
            raise ValueError(f"pattern of {len(self.pattern)} layers: valid: {shape} and its KV heads")
        allotment = allotment.told_alike()
        return HeadsByReach(self, allotment, self.sizes(allotment))

    def sizes(self, a: Allotment) -> list[int]:
        """Entries of the heads of all layers, of those that look furthest first.

        Raises:
            ValueError: the budget leaves nothing for a head that looks far, or the others would hold only what always
                stays.
        """
        near, heads = self.sinks + self.recent, a.layers * a.kv_heads
        if near <= a.always:
            raise ValueError(
                f"sinks={self.sinks}, recent={self.recent}: layer 0, head 0 would hold nothing but the {a.always} "
                f"tokens that always stay; valid: {a.always + 1} or more together"
            )
        if a.budget <= near:
            raise ValueError(
                f"budget={a.budget}: layer 0, head 0 would hold no more than its sinks and recent tokens; "
                f"valid: {near + 1} or more"
            )
        far = math.ceil((a.budget - near) * heads / (a.length - near))
        share, rest = divmod(a.total - near * (heads - far), far)
        return [share + 1] * rest + [share] * (far - rest) + [near] * (heads - far)

    def reach(self, prompt: PromptAttention) -> list[float]:
        """How far each KV head of a layer looks: the part of its attention that is neither first nor latest."""
        weights = prompt.window_weights(self.window)
        rows, n = weights.shape[-2:]
        column = torch.arange(n, device=weights.device)
        row = torch.arange(n - rows, n, device=weights.device)[:, None]
        far = (column >= self.sinks) & (column <= row - self.recent)
        found: list[float] = (weights * far).sum(dim=-1).mean(dim=(1, 2)).tolist()
        return found


@dataclass
class HeadsByReach:
    """One request's: how far the heads seen so far look, and what they hold."""

    rule: RetrievalHeads
    allotment: Allotment
    sizes: Sequence[int]
    seen: list[Sequence[float]] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)

    @property
    def revises(self) -> bool:
        return self.rule.revises

    def told(self, layer: int) -> int:
        return self.allotment.budget

    def cut(self, prompt: PromptAttention, scores: Tensor) -> dict[int, list[int]]:
        if self.rule.pattern:
            return {prompt.layer: ranked(self.rule.pattern, self.sizes)[prompt.layer]}
        self.seen.append(self.rule.reach(prompt))
        before, self.counts = self.counts, ranked(self.seen, self.sizes)
        return shrinking(self.counts, before)


def ranked(reach: Pattern, sizes: Sequence[int]) -> list[list[int]]:
    """The first of `sizes` for the head with the most, and so on; equal ones in their order."""
    heads = [(layer, head) for layer, row in enumerate(reach) for head in range(len(row))]
    counts = [[0] * len(row) for row in reach]
    for (layer, head), size in zip(sorted(heads, key=lambda at: -reach[at[0]][at[1]]), sizes, strict=False):
        counts[layer][head] = size
    return counts


def numbers(pattern: Any) -> Pattern:
    """As tuples; ValueError unless it is a list of lists of numbers."""
    listed = [layer for layer in pattern if isinstance(layer, Sequence)] if isinstance(pattern, Sequence) else []
    flat = [number for layer in listed for number in layer]
    valid = all(isinstance(number, int | float) and math.isfinite(number) for number in flat)
    if not flat or not valid or len(listed) != len(pattern):
        raise ValueError(f"pattern={str(pattern)[:60]}: valid: a list for every layer with a number for each KV head")
    return tuple(tuple(float(number) for number in layer) for layer in listed)
