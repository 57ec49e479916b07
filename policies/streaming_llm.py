"""StreamingLLM: a few attention sinks and a sliding window (Xiao et al. 2023, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from policies.base import RankedPolicy, keep_all
from src.kv.state import State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class StreamingLLM(RankedPolicy):
    """Keep the first `sinks` tokens and the last `budget - sinks`; every new token pushes the oldest recent one out.

    In the paper positions are those *inside the cache*: key number s of the cache is rotated to position s and
    the query to the last one. Rotary attention depends on differences only, and the recent tokens are
    contiguous, so against them nothing changes; against the sinks the query is closer by the number of evicted
    tokens. The query is therefore turned back by that number for the sinks' logits: the paper's rule exactly,
    at the price of one rotation per step.

    Args:
        sinks: first tokens that always stay; 4 in the paper and its code.
        positions: "cache" as in the paper, or "original": every key keeps the position it had in the text
            (what many re-implementations do).

    The prompt itself is read with full attention, as for every policy here; the paper streams it as well.
    """

    sinks: int = 4
    positions: Literal["cache", "original"] = "cache"
    evicts_while_decoding: ClassVar[bool] = True

    def check_parts(self) -> None:
        super().check_parts()
        if self.allocate is not None and self.positions == "cache":
            raise ValueError("positions=cache: counts in caches of one size; valid with an allocator: original")

    def least_budget(self) -> int:
        return self.sinks + 1

    def keep_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        """As `rank_prompt` says, without a sort."""
        positions = keep_all(prompt)
        if prompt.length <= budget:
            return positions
        return torch.cat([positions[:, : self.sinks], positions[:, prompt.length - budget + self.sinks :]], dim=-1)

    def rank_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        positions = keep_all(prompt)
        return positions.float().masked_fill(positions < self.sinks, torch.inf)

    def adjust_logits(self, step: DecodeStep) -> None:
        if self.positions == "original" or self.sinks == 0:
            return
        evicted = (step.position - step.budget).clamp_min(0)
        query = step.rotate(step.query, -evicted)
        sinks = step.keys[:, :, : self.sinks]
        turned = (query @ sinks.transpose(2, 3)) * step.scaling
        # Until something has been evicted nothing moves, and slots may still be empty (-inf).
        moved = (evicted > 0)[:, None, None, None]
        step.logits[..., : self.sinks] = torch.where(moved, turned, step.logits[..., : self.sinks])

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        return step.positions.float().masked_fill(step.positions < self.sinks, torch.inf)
