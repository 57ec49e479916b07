"""H2O: heavy hitters by accumulated attention, plus recent tokens (Zhang et al. 2023, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from policies.base import ScorePolicy, State, lowest_slot

if TYPE_CHECKING:
    from src.cache import DecodeStep
    from src.prompt_attention import PromptAttention


@dataclass(frozen=True)
class H2O(ScorePolicy):
    """Keep the tokens that received most attention so far, and the most recent ones.

    Score of key j, exact, over *all* query rows (prompt at once, then one row per decoded token):

        S_j = sum over i >= j of a_ij,   a = softmax(q k^T / sqrt(d)), causal

    Every decoding step adds its row, then the lowest score outside the recent tokens is evicted.

    Args:
        heavy_share: part of the budget for heavy hitters; the rest is recent. The paper halves it.

    With grouped-query attention the scores of a KV head's query heads are averaged, so that there is one kept
    set per KV head (the authors' code has no grouped heads; this is what memory savings need).
    """

    heavy_share: float = 0.5
    evicts_while_decoding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heavy_share > 1:
            raise ValueError(f"heavy_share={self.heavy_share}: valid: a share in [0, 1]")

    def recent(self, budget: int) -> int:
        return budget - min(budget - 1, max(1, round(self.heavy_share * budget)))

    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        return prompt.column_sums().mean(dim=1)

    def start(self, prompt: PromptAttention, kept: Tensor, budget: int) -> State:
        return State(slots={"score": self.score(prompt, budget).gather(-1, kept)})

    def observe(self, step: DecodeStep, state: State) -> None:
        state.slots["score"] += step.weights.mean(dim=2)

    def evict(self, step: DecodeStep, state: State) -> Tensor:
        return lowest_slot(state.slots["score"][..., :-1], self.protect_recent(step))
