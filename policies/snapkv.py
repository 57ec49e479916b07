"""SnapKV: what the end of the prompt looks at (Li et al. 2024, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.base import ScorePolicy
from src.kv.state import State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class SnapKV(ScorePolicy):
    """Keep the observation window and the prompt tokens it attends to most; nothing is evicted while decoding.

        s_j = pool( mean over the group of sum over the last w rows of a_ij ),  j < n - w

    The cache therefore grows by one entry per generated token beyond `budget`, unless `decode_eviction` is on.

    Args:
        window: w, the observation window, always kept; 32 in the paper's LongBench runs.
        kernel: width of the pooling along the prompt, 7 there; 1 switches pooling off.
        pooling: "max" there; "avg" is the default of the authors' class.
        decode_eviction: hold the cache at `budget` by the same rule: the window moves along with the output, and
            the lowest s_j outside it leaves. Ours, not the paper's: the unified baseline in comparisons with SCOPE.
        group: how a KV head's query heads are joined before pooling: "mean" or "max". The authors repeat keys
            to query heads and cache four times as much on Llama-3; one set per KV head is Ada-KV's variant.
    """

    window: int = 32
    kernel: int = 7
    pooling: Literal["max", "avg"] = "max"
    group: Literal["mean", "max"] = "mean"
    decode_eviction: bool = False

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

    def limit(self, budget: int, kept: int) -> int | None:
        return budget if self.decode_eviction else None

    def start(self, prompt: PromptAttention, kept: Tensor, budget: int) -> State:
        """With `decode_eviction`, the window's rows over the kept tokens, oldest first, `(kv_heads, group, w, k)`.

        For `group=mean` the group is averaged at once (length 1): means and sums may change places.
        """
        if not self.decode_eviction:
            return State()
        rows = prompt.window_weights(self.window)
        rows = F.pad(rows, (0, 0, self.window - rows.shape[2], 0))
        rows = rows.mean(dim=1, keepdim=True) if self.group == "mean" else rows
        return State(slots={"rows": rows.gather(-1, kept[:, None, None].expand(*rows.shape[:3], -1))})

    def observe(self, step: DecodeStep, state: State) -> None:
        if self.decode_eviction:
            row = step.weights.mean(dim=2, keepdim=True) if self.group == "mean" else step.weights
            state.slots["rows"][..., step.t % self.window, :] = row

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        score = state.slots["rows"][..., :-1].sum(dim=-2).amax(dim=2)
        protected = self.protect_recent(step)
        if self.kernel > 1:
            score = pool_cached(score, step.positions, self.kernel, self.pooling, left_out=protected)
        return score.masked_fill(protected, torch.inf)


def pool(scores: Tensor, kernel: int, kind: str) -> Tensor:
    """Pooling along the last dimension, stride 1, same length; averages count real neighbours only."""
    if kernel == 1:
        return scores
    if kind == "max":
        return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2, count_include_pad=False)


def pool_cached(
    scores: Tensor, positions: Tensor, width: int, kind: str = "max", left_out: Tensor | None = None
) -> Tensor:
    """Pooling along the text over the tokens that are still cached, `(lanes, kv_heads, slots)`, all three.

    Slots are not in the order of the text, so neighbours are found by position; `left_out` slots count for none.
    """
    order = positions.argsort(dim=-1)
    at = positions.gather(-1, order)
    present = torch.ones_like(order, dtype=torch.bool) if left_out is None else ~left_out.gather(-1, order)
    ordered = scores.gather(-1, order)
    lowest = -torch.inf if kind == "max" else 0.0
    best, count = ordered.masked_fill(~present, lowest), present.to(scores.dtype)
    source, one = best.clone(), count.clone()
    for shift in range(1, min(width // 2, scores.shape[-1] - 1) + 1):
        near = at[..., shift:] - at[..., :-shift] <= width // 2
        for to, off in ((slice(None, -shift), slice(shift, None)), (slice(shift, None), slice(None, -shift))):
            other = source[..., off].masked_fill(~near, lowest)
            if kind == "max":
                best[..., to] = torch.maximum(best[..., to], other)
            else:
                best[..., to] += other
                count[..., to] += one[..., off] * near
    pooled = best if kind == "max" else best / count.clamp_min(1)
    return torch.empty_like(pooled).scatter_(-1, order, pooled)
