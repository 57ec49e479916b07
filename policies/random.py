"""Random: a uniform sample of the older tokens. The control that every score must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from policies.base import ScorePolicy
from src.kv.state import State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class Random(ScorePolicy):
    """Keep the last `window` tokens, and of the older ones those with the highest random priority

        u(seed, layer, head, position)  uniform in [0, 1): a hash, not a generator

    A token's priority never changes, so at every moment of prompt and decoding the older part of the cache is a
    uniform sample (without replacement) of all older positions, drawn anew for each layer and KV head. Nothing
    depends on which lanes run together, in which order, or how often.

    Args:
        window: recent tokens that always stay; 32 as in SnapKV and AhaKV, so that only the score differs from
            them. 0: a random sample of everything.
        seed: of the hash.
    """

    window: int = 32
    seed: int = 0
    evicts_while_decoding: ClassVar[bool] = True
    may_refuse: ClassVar[bool] = True  # without a window the incoming token takes its chance like any other

    def recent(self, budget: int) -> int:
        return self.window

    def least_budget(self) -> int:
        return self.window + 1

    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        positions = torch.arange(prompt.length, device=prompt.keys.device)
        return priority(self.seed, prompt.layer, positions.expand(prompt.kv_heads, -1))

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        incoming = step.position[:, None, None].expand(*step.positions.shape[:2], 1)
        positions = torch.cat([step.positions, incoming], dim=-1)
        return priority(self.seed, step.layer, positions).masked_fill(positions > incoming - self.window, torch.inf)


def priority(seed: int, layer: int, positions: Tensor) -> Tensor:
    """Uniform in [0, 1) for each position of each KV head; `(..., kv_heads, slots)` in and out, float64."""
    heads = torch.arange(positions.shape[-2], device=positions.device)[:, None]
    mixed = torch.full_like(heads, seed, dtype=torch.int64)
    for part in (torch.full_like(heads, layer), heads, positions.long()):
        mixed = scramble(mixed + 0x9E3779B9 + part)
    # 31 bits of hash and then the position: no two tokens of a head have the same priority.
    return ((mixed >> 1) * 2**21 + positions).double() / 2**52


def scramble(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3: every bit of a 32-bit number moves every bit of the result."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
