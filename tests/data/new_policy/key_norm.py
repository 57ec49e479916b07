"""Keep the tokens with the smallest keys (Devoto et al. 2024, arXiv 2406.11430): they are attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from policies.base import ScorePolicy

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.state import State
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class KeyNorm(ScorePolicy):
    window: int = 16  # latest tokens, always kept
    evicts_while_decoding = True

    def recent(self, budget: int) -> int:
        return self.window

    def least_budget(self) -> int:
        return self.window + 1

    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        return -prompt.keys.norm(dim=-1)  # (kv_heads, n): the highest scores stay

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        return -step.keys.norm(dim=-1).masked_fill(self.protect_recent(step), -torch.inf)  # the lowest leaves
