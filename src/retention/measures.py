"""Which positions survived: measures of position bias on recorded kept sets. Pure functions.

`kept` is always a boolean array (..., n) over prompt positions 0 .. n - 1, usually (layers, kv_heads, n).

Denominators. A *share* is kept entries in a part of the domain / all kept entries of that head in the domain,
so shares sum to 1. An *occupancy* is kept entries in a part / positions in that part. The *domain* is the
whole prompt, or, with `exclude_recent=w`, the prompt without its last w positions taken as if it were the
whole (relative positions, bins and deciles are then of n - w): a forced recent window says nothing about what
a score prefers. Position p has relative position (p + 1/2) / n, so that a uniform kept set has mean 1/2
exactly. KL is in nats. A head that kept nothing in the domain has no shares: NaN.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from src.errors import InputError
from src.kv import position
from src.retention import per_head
from src.retention.store import BINS, KeptSample, Retention, bin_counts, bin_edges

Floats = NDArray[np.float64]


# --- where the kept positions lie ---


def domain(kept: NDArray[np.bool_], exclude_recent: int = 0) -> NDArray[np.bool_]:
    """The kept set without the last `exclude_recent` positions (an empty one where nothing else is left)."""
    return kept[..., : max(kept.shape[-1] - exclude_recent, 0)]


def recent_window(kept: NDArray[np.bool_]) -> int:
    """The longest run of last positions that every layer and head kept: the forced recent window, as
    observed.

    Heads may agree on a few more positions by chance, so give `exclude_recent` yourself where you know it.
    """
    everywhere = kept.reshape(-1, kept.shape[-1]).all(axis=0)
    dropped = np.flatnonzero(~everywhere)
    return int(kept.shape[-1] - 1 - dropped[-1]) if dropped.size else int(kept.shape[-1])


def shares(counts: ArrayLike) -> Floats:
    """counts / their sum over the last axis."""
    counts = np.asarray(counts, dtype=float)
    total = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


def histogram(kept: NDArray[np.bool_], bins: int = BINS, exclude_recent: int = 0) -> Floats:
    """(..., bins) share of the kept entries in each bin of relative position."""
    return shares(bin_counts(domain(kept, exclude_recent), bins))


def decile_shares(kept: NDArray[np.bool_], exclude_recent: int = 0) -> Floats:
    """(..., 10) share of the kept entries in each tenth of the domain."""
    return histogram(kept, 10, exclude_recent)


def occupancy(kept: NDArray[np.bool_], bins: int = BINS, exclude_recent: int = 0) -> Floats:
    """(..., bins) kept entries / positions of the bin; NaN for bins without any (prompts under 64 tokens)."""
    kept = domain(kept, exclude_recent)
    counts, positions = bin_counts(kept, bins).astype(float), capacity(kept.shape[-1], bins)
    return np.divide(counts, positions, out=np.full_like(counts, np.nan), where=positions > 0)


def capacity(n: int, bins: int = BINS) -> NDArray[np.int64]:
    """How many of n positions each bin holds."""
    return np.diff(bin_edges(n, bins))


def mean_position(kept: NDArray[np.bool_], exclude_recent: int = 0) -> Floats:
    """(...) mean relative position of the kept entries in the domain (see `src.retention.per_head`)."""
    return per_head.mean_position(domain(kept, exclude_recent))


def kl_to_uniform(share: ArrayLike, positions: ArrayLike | None = None) -> Floats:
    """(...) KL(share || uniform) over the last axis in nats. Uniform gives every position, not every bin, the
    same.

    `positions` is how many positions each bin holds (default: equal). 0 for no preference; ln(bins) at most
    when equal.
    """
    share, reference = _with_reference(share, positions)
    ratio = np.divide(share, reference, out=np.ones_like(share), where=share > 0)
    return (share * np.log(ratio)).sum(axis=-1)


def gini(share: ArrayLike, positions: ArrayLike | None = None) -> Floats:
    """(...) Gini coefficient over bins of kept entries per position: 0 all alike, 1 - 1/bins all in one."""
    share, reference = _with_reference(share, positions)
    density = np.divide(share, reference, out=np.full_like(share, np.inf), where=reference > 0)
    order = np.argsort(density, axis=-1)
    width = np.take_along_axis(reference, order, axis=-1)
    height = np.cumsum(np.take_along_axis(share, order, axis=-1), axis=-1)  # the Lorenz curve
    before = np.concatenate([np.zeros_like(height[..., :1]), height[..., :-1]], axis=-1)
    return 1 - ((height + before) * width).sum(axis=-1)


def _with_reference(share: ArrayLike, positions: ArrayLike | None) -> tuple[Floats, Floats]:
    share = np.asarray(share, dtype=float)
    reference = shares(np.ones(share.shape[-1]) if positions is None else positions)
    return share, np.broadcast_to(reference, share.shape)


# --- a span, two policies, two moments ---


def share_of_span_kept(kept: NDArray[np.bool_], start: int, stop: int) -> Floats:
    """(...) kept positions in start .. stop - 1 / (stop - start): how much of the needle is still there."""
    if not 0 <= start < stop <= kept.shape[-1]:
        raise ValueError(f"span {start}..{stop} is not in a prompt of {kept.shape[-1]} tokens")
    return kept[..., start:stop].mean(axis=-1)


def jaccard(a: NDArray[np.bool_], b: NDArray[np.bool_], exclude_recent: int = 0) -> Floats:
    """(...) positions kept by both / positions kept by either; NaN where neither kept any."""
    a, b = domain(a, exclude_recent), domain(b, exclude_recent)
    either = (a | b).sum(axis=-1)
    return np.divide((a & b).sum(axis=-1), either, out=np.full(either.shape, np.nan), where=either > 0)


def drift(prompt: NDArray[np.bool_], end: NDArray[np.bool_]) -> Floats:
    """(...) of the positions kept after the prompt, the share no longer held when decoding ended."""
    total = prompt.sum(axis=-1)
    lost = (prompt & ~end).sum(axis=-1)
    return np.divide(lost, total, out=np.full(total.shape, np.nan), where=total > 0)


def overlap(a: Retention, b: Retention, moment: str = "prompt", exclude_recent: int = 0) -> dict[str, Any]:
    """Jaccard overlap of two policies on the samples both have (same task, id and prompt).

    Every sample, layer and head weighs the same. `samples` counts the matched ones; without any, an
    InputError.
    """
    keys = [key for key in a.keys if key in b]
    if not keys:
        raise InputError(f"{a.path} and {b.path}: no sample in common (same task, id and prompt)")
    by_task: dict[str, list[Floats]] = {}
    for key in keys:
        first, second = a.sample(key).kept(moment), b.sample(key).kept(moment)
        if first.shape != second.shape:
            raise InputError(f"{a.path} and {b.path}: results of different models or prompts cannot be compared")
        by_task.setdefault(key[0], []).append(jaccard(first, second, exclude_recent))
    every = np.stack([each for rows in by_task.values() for each in rows])
    return {
        "samples": len(keys),
        "mean": nan_mean(every),
        "per_layer": [nan_mean(every[:, layer]) for layer in range(every.shape[1])],
        "per_head": [[nan_mean(every[:, i, j]) for j in range(every.shape[2])] for i in range(every.shape[1])],
        "per_task": {task: nan_mean(np.stack(rows)) for task, rows in sorted(by_task.items())},
    }


def span_retention(samples: Iterable[KeptSample], spans: dict[tuple[str, str], tuple[int, int]]) -> dict[str, Any]:
    """Share of each sample's span (task, id -> start, stop in tokens) kept: after the prompt and at the end.

    Every sample, layer and head weighs the same; `whole_in_some_head` is the share of samples of which at
    least one head kept the entire span. Samples stored as counts (retention=bins) cannot say and are left out.
    """
    rows: list[tuple[Floats, float, bool]] = []
    by_task: dict[str, list[float]] = {}
    for sample in samples:
        span = spans.get(sample.key[:2])
        if span is not None and not sample.binned:
            first, last = (share_of_span_kept(sample.kept(moment), *span) for moment in ("prompt", "end"))
            rows.append((first, float(last.mean()), bool((first == 1).any())))
            by_task.setdefault(sample.task, []).append(float(first.mean()))
    if not rows:
        return {"samples": 0}
    after = np.stack([row[0] for row in rows])
    return {
        "samples": len(rows),
        "after_prompt": nan_mean(after),
        "at_end": nan_mean([row[1] for row in rows]),
        "whole_in_some_head": nan_mean([row[2] for row in rows]),
        "per_layer": [nan_mean(after[:, layer]) for layer in range(after.shape[1])],
        "per_task": {task: nan_mean(shares) for task, shares in sorted(by_task.items())},
    }


# --- accumulated attention against position: the theory ---


def expected_accumulation(n: int) -> Floats:
    """E[S_j] = H_n - H_(j-1), j = 1 .. n: accumulated attention under exchangeable logits, about ln(n/j)."""
    return np.cumsum(1 / np.arange(n, 0, -1))[::-1]


def log_slope(scores: ArrayLike, first: int = 1, last: int | None = None) -> Floats:
    """(...) least-squares slope of ln S_j against ln j over positions j = first .. last (1-based, inclusive).

    See `src.kv.position.log_slope`. 0: no position bias; -1: S_j ~ 1/j.
    """
    scores = np.asarray(scores, dtype=float)
    last = scores.shape[-1] if last is None else last
    if not 1 <= first < last <= scores.shape[-1]:
        raise ValueError(f"positions {first}..{last}: need at least two within 1..{scores.shape[-1]}")
    return np.asarray(position.log_slope(torch.tensor(scores[..., first - 1 : last].copy()), first))


def slope_beside_theory(scores: ArrayLike, first: int = 1, last: int | None = None) -> dict[str, Any]:
    """Slopes of measured accumulated scores (..., n) beside that of E[S_j] over the same positions."""
    scores = np.asarray(scores, dtype=float)
    theory = expected_accumulation(scores.shape[-1])
    return {"measured": log_slope(scores, first, last), "theory": float(log_slope(theory, first, last))}


def nan_mean(values: ArrayLike) -> float | None:
    """Mean of the values that exist, None of none."""
    values = np.asarray(values, dtype=float)
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else None
