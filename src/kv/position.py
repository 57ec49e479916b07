"""How a policy's score depends on a token's place in the prompt, as tensors: what AhaKV's claim is about.

`src.retention.measures` asks it for slopes of arrays, and has the curve that exchangeable logits would give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.kv.prompt import precise


def log_slope(scores: Tensor, first: int = 1) -> Tensor:
    """Least-squares slope of ln(score) against ln(position), `(..., n)` -> `(...)`; positions count from `first`.

    0: no preference; -1: the score falls like 1 / position. Scores of 0 (no logarithm) and of infinity (protected
    tokens) are left out; NaN where fewer than two are left, and where a score is negative.
    """
    scores = precise(scores)
    valid = (scores > 0) & scores.isfinite()
    there = valid.to(scores.dtype)
    x = torch.arange(first, first + scores.shape[-1], device=scores.device, dtype=scores.dtype).log()
    y = torch.where(valid, scores, 1).log()
    count = there.sum(-1, keepdim=True)
    x = (x - (x * there).sum(-1, keepdim=True) / count) * there
    y = (y - (y * there).sum(-1, keepdim=True) / count) * there
    slope = (x * y).sum(-1) / x.square().sum(-1)
    return torch.where((scores < 0).any(-1), torch.nan, slope)


def octave_means(scores: Tensor) -> Tensor:
    """Mean score of positions 1, 2-3, 4-7, 8-15, ..., relative to the mean of all, `(..., n)` -> `(..., octaves)`.

    Scores of infinity (protected tokens) are left out; NaN for an octave in which no other is, and for all where a
    score is negative: then a ratio to the mean says nothing.
    """
    scores = precise(scores)
    finite = scores.isfinite()
    both = torch.stack([torch.where(finite, scores, 0).double(), finite.double()])
    ends = [min(2 ** (i + 1) - 1, scores.shape[-1]) - 1 for i in range(scores.shape[-1].bit_length())]
    upto = both.cumsum(-1)[..., torch.tensor(ends, device=scores.device)]
    sums, count = torch.diff(upto, dim=-1, prepend=torch.zeros_like(upto[..., :1]))
    total, there = upto[..., -1:]
    means = (sums / count * (there / total)).to(scores.dtype)
    return torch.where((scores < 0).any(-1, keepdim=True), torch.nan, means)
