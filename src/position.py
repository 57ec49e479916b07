"""How a policy's score depends on a token's place in the prompt, as tensors: what AhaKV's claim is about.

`src.retention` has the same slope for arrays, and the curve that exchangeable logits would give.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_slope(scores: Tensor) -> Tensor:
    """Least-squares slope of ln(score) against ln(position), `(..., n)` -> `(...)`; positions count from 1.

    0: no preference; -1: the score falls like 1 / position. Scores of 0 (no logarithm) and of infinity (protected
    tokens) are left out; NaN where fewer than two are left.
    """
    valid = (scores > 0) & scores.isfinite()
    there = valid.to(scores.dtype)
    x = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype).log()
    y = torch.where(valid, scores, 1).log()
    count = there.sum(-1, keepdim=True)
    x = (x - (x * there).sum(-1, keepdim=True) / count) * there
    y = (y - (y * there).sum(-1, keepdim=True) / count) * there
    return (x * y).sum(-1) / x.square().sum(-1)


def octave_means(scores: Tensor) -> Tensor:
    """Mean score of positions 1, 2-3, 4-7, 8-15, ..., relative to the mean of all, `(..., n)` -> `(..., octaves)`.

    Scores of infinity (protected tokens) are left out; NaN for an octave in which no other is.
    """
    n = scores.shape[-1]
    there = scores.isfinite().to(scores.dtype)
    known = torch.where(scores.isfinite(), scores, 0)
    octave = torch.arange(1, n + 1, device=scores.device).double().log2().floor().long()
    sums, count = (x.new_zeros(*x.shape[:-1], n.bit_length()).index_add_(-1, octave, x) for x in (known, there))
    return sums / count * (there.sum(-1, keepdim=True) / known.sum(-1, keepdim=True))
