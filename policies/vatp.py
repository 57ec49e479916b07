"""VATP: accumulated attention times the size of the value (Guo et al. 2024, arXiv 2406.12335)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from policies.h2o import H2O
from src.kv.prompt import vector_norm
from src.kv.state import State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class VATP(H2O):
    """H2O with the score

        S_j * ||v_j||_1

    since a token adds a_ij v_j to the output. Sinks have tiny values and would go first, so the first tokens are
    protected; they are part of the heavy share, as in the authors' code (its other base, Scissorhands, is not here).

    Args:
        sinks: first tokens that always stay; 20 in the authors' command.
        heavy_share, normalise: see H2O.
    """

    sinks: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks and not self.heavy_share:
            raise ValueError("heavy_share=0: valid: above 0, the protected first tokens are part of it")

    def least_budget(self) -> int:
        """The heavy share must hold one token beside the protected ones."""
        return next(budget for budget in count(2) if budget - self.recent(budget) > self.sinks or not self.sinks)

    def staying(self, budget: int) -> int:
        return self.recent(budget) + self.sinks

    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        score = super().score(prompt, budget) * prompt.value_norms("l1")
        score[:, : self.sinks] = torch.inf
        return score

    def prompt_measures(self, prompt: PromptAttention, budget: int) -> dict[str, Tensor]:
        """H2O's, without the theory: it is about sums that no value norm multiplies."""
        found = super().prompt_measures(prompt, budget)
        found.pop("score_slope_theory", None)
        return found

    def start(self, prompt: PromptAttention, kept: Tensor, budget: int) -> State:
        state = super().start(prompt, kept, budget)
        state.slots["norm"] = prompt.value_norms("l1").gather(-1, kept)
        return state

    def observe(self, step: DecodeStep, state: State) -> None:
        super().observe(step, state)
        state.slots["norm"][..., -1] = vector_norm(step.value, "l1")

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        score = (self.current(state) * state.slots["norm"])[..., :-1]
        return score.masked_fill(self.protect_recent(step) | (step.positions < self.sinks), torch.inf)
