"""The second part of HCAttention alone: a step attends to the fewest tokens with a part of the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.parts import Reader

if TYPE_CHECKING:
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class SmallestSet(Reader):
    """With a~ the weights sorted from the largest, k* = min{k : sum of the first k >= tau}; those are attended to.

    Per layer, step and query head (the last is ours), of what is held (arXiv 2507.19823).

    Args:
        tau: attention mass of the chosen set, (0, 1]; 1 attends to everything.
        renormalise: see `Reader` (what the paper does is not known; without it attention outputs shrink by up to
            1 - tau).
    """

    tau: float = 0.9
    reconstruction: ClassVar[str] = (
        "the choice of tokens is HCAttention's, as a third party's notes tell it; the paper's body could not be read"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau={self.tau}: valid: a share of the attention in (0, 1]; 1 attends to everything")

    def choose(self, step: DecodeStep) -> Tensor | None:
        return None if self.tau == 1 else smallest_set(step.weights, self.tau)


def smallest_set(weights: Tensor, tau: float) -> Tensor:
    """True for the fewest largest weights of each row that add up to at least `tau`."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = F.pad(ordered.cumsum(-1)[..., :-1], (1, 0))
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, (before < tau) & (ordered > 0))
