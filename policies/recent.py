"""Recent: a sliding window and nothing else. StreamingLLM without its sinks shows what the sinks are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from policies.base import RankedPolicy, keep_all
from src.kv.state import State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class Recent(RankedPolicy):
    """Keep the last `budget` tokens ("window attention" in Xiao et al. 2023, arXiv 2309.17453, where it fails).

    Every key keeps its original position; the tokens are contiguous, so positions inside the cache would give the
    same attention.
    """

    evicts_while_decoding: ClassVar[bool] = True

    def rank_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        return keep_all(prompt).float()

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        return step.positions.float()
