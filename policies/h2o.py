"""H2O: heavy hitters by accumulated attention, plus recent tokens (Zhang et al. 2023, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from policies.base import ScorePolicy
from src.kv.position import log_slope
from src.kv.state import State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class H2O(ScorePolicy):
    """Keep the tokens that received most attention so far, and the most recent ones.

    Score of key j, exact, over *all* query rows (prompt at once, then one row per decoded token):

        S_j = sum over i >= j of a_ij,   a = softmax(q k^T / sqrt(d)), causal

    Every decoding step adds its row, then the lowest score outside the recent tokens is evicted.

    Args:
        heavy_share: part of the budget for heavy hitters; the rest is recent. The paper halves it.
        normalise: what S_j is divided by, against its bias towards early tokens: "none" as in the paper; "rows",
            the number of rows that can see j (kvpress' mean; the bias shrinks but stays); "expectation",
            E[S_j] under exchangeable logits, the sum of 1 / (tokens that row i sees) over i >= j. After the
            prompt that is H_n - H_(j-1); a decoding row sees the cached tokens and its own.

    With grouped-query attention the scores of a KV head's query heads are averaged, so that there is one kept
    set per KV head (the authors' code has no grouped heads; this is what memory savings need).
    """

    heavy_share: float = 0.5
    normalise: Literal["none", "rows", "expectation"] = "none"
    evicts_while_decoding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heavy_share > 1:
            raise ValueError(f"heavy_share={self.heavy_share}: valid: a share in [0, 1]")

    def recent(self, budget: int) -> int:
        return budget - min(budget - 1, max(1, round(self.heavy_share * budget)))

    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        sums = prompt.column_sums().mean(dim=1)
        return sums if self.normalise == "none" else sums / self._divisor(sums)

    def prompt_measures(self, prompt: PromptAttention, budget: int) -> dict[str, Tensor]:
        """Beside the measured slope, the one that E[S_j] = H_n - H_(j-1) would give, divided alike."""
        found = super().prompt_measures(prompt, budget)
        if found:
            n = prompt.length
            expected = (1 / torch.arange(n, 0, -1, device=prompt.keys.device, dtype=torch.float64)).cumsum(0).flip(0)
            if self.normalise != "none":
                expected = expected / self._divisor(expected)
            found["score_slope_theory"] = log_slope(expected[: n - self.recent(budget)])
        return found

    def start(self, prompt: PromptAttention, kept: Tensor, budget: int) -> State:
        sums = prompt.column_sums().mean(dim=1)
        state = State(slots={"score": sums.gather(-1, kept)})
        if self.normalise != "none":
            state.slots["divisor"] = self._divisor(sums).expand_as(sums).gather(-1, kept)
        return state

    def observe(self, step: DecodeStep, state: State) -> None:
        state.slots["score"] += step.weights.mean(dim=2)
        if self.normalise == "rows":
            state.slots["divisor"] += 1
        elif self.normalise == "expectation":
            seen = (step.positions >= 0).sum(dim=-1, keepdim=True) + 1
            state.slots["divisor"] += 1 / seen

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        return self.current(state)[..., :-1].masked_fill(self.protect_recent(step), torch.inf)

    def current(self, state: State) -> Tensor:
        """The score of every cached token, and in the last column of the incoming one."""
        score = state.slots["score"]
        return score if self.normalise == "none" else score / state.slots["divisor"]

    def _divisor(self, sums: Tensor) -> Tensor:
        """What each token's sum over the prompt's rows is divided by, `(n,)`."""
        n = sums.shape[-1]
        seen = torch.arange(1, n + 1, device=sums.device, dtype=sums.dtype)  # tokens that each row sees
        rows = torch.ones_like(seen) if self.normalise == "rows" else 1 / seen
        return rows.flip(0).cumsum(0).flip(0)
