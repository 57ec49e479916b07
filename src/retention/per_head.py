"""Measures of what one head kept: figures of `retention` in metrics.json and columns of the report.

A new one is an entry of PER_HEAD here, and nothing else: its mean over samples, layers and KV heads stands in
metrics.json, of the whole prompt and without the recent window (`heavy`), per layer, head and task, and in the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """A figure per layer and KV head.

    Attributes:
        of_kept: of a boolean array (..., n) over prompt positions, -> (...); NaN only for heads that kept none.
        of_shares: the same, as well as it can be said, of the shares (..., bins) of the kept entries in equal parts of
            the prompt: all there is with retention=bins and of the tokens that a policy chose.
        what: it says, in a line.
        unit: of it.
        head, below: the two lines over its column.
    """

    of_kept: Callable[[NDArray[np.bool_]], Floats]
    of_shares: Callable[[Floats], Floats]
    what: str
    unit: str
    head: str
    below: str


def mean_position(kept: NDArray[np.bool_]) -> Floats:
    """(...) mean relative position of the kept entries: 0 the beginning, 1 the end, 1/2 no preference."""
    shape, n = kept.shape[:-1], max(kept.shape[-1], 1)
    head, position = np.divmod(np.flatnonzero(kept), n)
    total = np.bincount(head, minlength=math.prod(shape))
    places = np.bincount(head, (position + 0.5) / n, minlength=math.prod(shape))
    return np.divide(places, total, out=np.full(total.shape, np.nan), where=total > 0).reshape(shape)


def mean_position_of_shares(shares: Floats) -> Floats:
    """The same, positions taken to lie in the middle of their bin."""
    bins = shares.shape[-1]
    return np.asarray(shares @ ((np.arange(bins) + 0.5) / bins))


PER_HEAD = {
    "mean_position": Measure(
        mean_position,
        mean_position_of_shares,
        what="of the kept entries; 0: first token, 1: last",
        unit="share of the prompt",
        head="mean position",
        below="0 start, 1 end",
    ),
}
