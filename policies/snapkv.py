"""SnapKV: what the end of the prompt looks at (Li et al. 2024, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from policies.base import ScorePolicy

if TYPE_CHECKING:
    from src.prompt_attention import PromptAttention


@dataclass(frozen=True)
class SnapKV(ScorePolicy):
    """Keep the observation window and the prompt tokens it attends to most; nothing is evicted while decoding.

        s_j = pool( mean over the group of sum over the last w rows of a_ij ),  j < n - w

    The cache therefore grows by one entry per generated token beyond `budget`.

    Args:
        window: w, the observation window, always kept; 32 in the paper's LongBench runs.
        kernel: width of the pooling along the prompt, 7 there; 1 switches pooling off.
        pooling: "max" there; "avg" is the default of the authors' class.
        group: how a KV head's query heads are joined before pooling: "mean" or "max". The authors repeat keys
            to query heads and cache four times as much on Llama-3; one set per KV head is Ada-KV's variant.
    """

    window: int = 32
    kernel: int = 7
    pooling: Literal["max", "avg"] = "max"
    group: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window={self.window}, kernel={self.kernel}: valid: a window of 1 or more, an odd kernel")

    def recent(self, budget: int) -> int:
        return self.window

    def least_budget(self) -> int:
        return self.window + 1

    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        received = prompt.window_weights(self.window).sum(dim=2)
        joined = received.mean(dim=1) if self.group == "mean" else received.amax(dim=1)
        # The window is kept anyway, and its own columns must not leak into the pooling of the older ones.
        return pool(joined[:, : prompt.length - self.window], self.kernel, self.pooling)


def pool(scores: Tensor, kernel: int, kind: str) -> Tensor:
    """Pooling along the last dimension, stride 1, same length; averages count real neighbours only."""
    if kernel == 1:
        return scores
    if kind == "max":
        return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2, count_include_pad=False)
