"""The theory behind AhaKV without a model: Gaussian queries and keys, a causal softmax, and where it fails.

For logits that are exchangeable within a row, E[a_ij] = 1/i, so attention accumulated over all rows of an
n-token text is E[S_j] = H_n - H_(j-1), about ln(n/j): it falls with the position although no token matters more
than another. `retention.measures.expected_accumulation` is that curve. Real attention is not exchangeable: most of a
row's mass often lies on the first token, which flattens the curve of all others (`expected_with_sinks`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from policies.ahakv import AhaKV, softmax_with_gain
from src.kv.prompt import PromptAttention

Floats = NDArray[np.float64]


def accumulated(
    n: int, draws: int = 16, dim: int = 64, scale: float = 1.0, sink: float = 0.0, sinks: int = 1, seed: int = 0
) -> Floats:
    """Attention that every token of `n` accumulates, `(draws, n)`, for independent Gaussian queries and keys.

    Computed by the code that serves the policies (`PromptAttention.column_sums`).

    Args:
        dim: of queries and keys, whose entries have unit variance; logits are q k^T / sqrt(dim).
        scale: multiplies the logits, so it is about their standard deviation; 0 makes all of them equal.
        sink: added to the logits of the first `sinks` keys in every row: a sink draws e^sink times the
            attention of an ordinary token.
    """
    draw = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(draws, n, dim, generator=draw, dtype=torch.float64) for _ in range(2))
    scaling = dim**-0.5
    # One more dimension carries the sink: it adds 1 x sink to the logits of the first keys.
    ones = torch.full((draws, n, 1), 1 / scaling, dtype=torch.float64)
    extra = torch.zeros(draws, n, 1, dtype=torch.float64)
    extra[:, :sinks] = sink
    queries, keys = torch.cat([queries * scale, ones], dim=-1), torch.cat([keys, extra], dim=-1)
    return PromptAttention(queries, keys, keys, scaling, 0, 1).column_sums()[:, 0].numpy()


def expected_with_sinks(n: int, weight: float, sinks: int = 1) -> Floats:
    """(n,) accumulated attention when each of the first `sinks` keys draws `weight` times an ordinary one's share.

    Row i spreads its mass over min(i, sinks) sinks and the others: an ordinary key gets 1 / (i - s + s w), so it
    accumulates about ln((n + c) / (j + c)) with c = s (w - 1), flat while j is well below c. Weight 1 is
    H_n - H_(j-1).
    """
    row = np.arange(1, n + 1)
    there = np.minimum(row, sinks)
    share = 1 / (row - there + there * weight)
    received = np.cumsum(share[::-1])[::-1]
    return np.where(row <= sinks, weight, 1.0) * received


def slope_on_log(scores: ArrayLike, first: int = 1, last: int | None = None) -> tuple[float, float]:
    """Slope and intercept of S_j against ln(n/j) over j = first .. last (1-based): 1 and 0 if S_j = ln(n/j)."""
    scores = np.asarray(scores, dtype=float)
    n = scores.shape[-1]
    last = n if last is None else last
    if not 1 <= first < last <= n:
        raise ValueError(f"positions {first}..{last}: need at least two within 1..{n}")
    x = np.log(n / np.arange(first, last + 1))
    slope, intercept = np.polyfit(x, scores[..., first - 1 : last].reshape(-1, last - first + 1).mean(axis=0), 1)
    return float(slope), float(intercept)


@dataclass(frozen=True)
class RowEntropy:
    """Mean entropy of attention rows, in nats, with and without the step gain."""

    visible: int  # tokens in a row, i
    budget: int  # k
    gain: float  # sqrt(2 ln(i/k))
    ordinary: float
    sharpened: float

    @property
    def target(self) -> float:
        """ln k: the entropy of a row spread evenly over the budget."""
        return math.log(self.budget)

    @property
    def predicted(self) -> tuple[float, float]:
        """ln i - s^2/2 for logits of standard deviation s: 1 for the ordinary softmax, the gain for the other."""
        return math.log(self.visible) - 0.5, math.log(self.visible) - self.gain**2 / 2


def row_entropy(visible: int, budget: int, queries: int = 64, dim: int = 128, seed: int = 0) -> RowEntropy:
    """Rows of `visible` Gaussian keys under AhaKV's gain for `budget`, by the policy's own functions."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, dim, generator=draw, dtype=torch.float64) for rows in (queries, visible))
    logits = q @ k.T * dim**-0.5
    gain = AhaKV(gain_guard="literal")._gain(torch.tensor(visible), budget, torch.float64)

    def mean_entropy(factor: Tensor) -> float:
        return float(torch.special.entr(softmax_with_gain(logits, factor)).sum(dim=-1).mean())

    return RowEntropy(visible, budget, float(gain), mean_entropy(torch.ones(())), mean_entropy(gain))
