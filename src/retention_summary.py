"""Retention of a whole run: one pass over its samples, then the figures for metrics.json, W&B and the plots.

Every sample, layer and head weighs the same: a head's shares are of its own kept entries, and means are over
heads, layers and samples. KL and Gini are those of the mean shares (of the group they are quoted for), so
they describe the histogram that is drawn; single heads of single samples are far from uniform for any policy.
`heavy` leaves out each sample's recent window: `recent` positions, or, by default, the last positions that
all layers and heads kept. Samples whose prompt was kept whole have no heavy part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src import retention
from src.retention_store import BINS, KeptSample

Floats = NDArray[np.float64]
DIGITS = 5

# Share of 64-bin counts that falls in each tenth, positions spread evenly in their bin: only for
# retention=bins.
_EDGES = np.arange(BINS + 1) * 10 / BINS
_BINS_TO_TENTHS = np.clip(
    np.minimum(_EDGES[1:, None], np.arange(1, 11)) - np.maximum(_EDGES[:-1, None], np.arange(10)), 0, None
) * (BINS / 10)


@dataclass
class _Sums:
    """Sums over samples of (layers, kv_heads, ...) shares, and how many samples each head contributed."""

    histogram: Floats
    tenths: Floats
    position: Floats
    occupancy: Floats
    samples: Floats  # (layers, kv_heads)
    positions: Floats  # (64,) positions per bin / positions, summed over samples
    count: int = 0

    @classmethod
    def empty(cls, layers: int, heads: int) -> _Sums:
        shape = (layers, heads)
        bins, tenths, one = np.zeros((*shape, BINS)), np.zeros((*shape, 10)), np.zeros(shape)
        return cls(bins, tenths, one, bins.copy(), one.copy(), np.zeros(BINS))

    def add(self, counts: NDArray[np.int64], tenths: Floats, position: Floats, n: int) -> None:
        there = counts.sum(axis=-1) > 0
        if not there.any():
            return
        capacity = retention.capacity(n)
        self.histogram += np.nan_to_num(retention.shares(counts))
        self.tenths += np.nan_to_num(retention.shares(tenths))
        self.position += np.nan_to_num(position)
        self.occupancy += counts / np.maximum(capacity, 1)
        self.samples += there
        self.positions += capacity / n
        self.count += 1

    def plus(self, other: _Sums) -> _Sums:
        names = ("histogram", "tenths", "position", "occupancy", "samples", "positions", "count")
        return _Sums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def measures(self, group: Any = ()) -> dict[str, Any] | None:
        """The figures of a group of heads, chosen by an index into (layers, kv_heads)."""
        samples = self.samples[group].sum()
        if not samples:
            return None
        axes = tuple(range(self.samples[group].ndim))
        histogram, tenths = (x[group].sum(axis=axes) / samples for x in (self.histogram, self.tenths))
        return {
            "decile_shares": rounded(tenths),
            "mean_position": rounded(self.position[group].sum() / samples),
            "kl_uniform": rounded(retention.kl_to_uniform(histogram, self.positions)),
            "gini": rounded(retention.gini(histogram, self.positions)),
            "first_to_last_decile": rounded(tenths[0] / tenths[-1]) if tenths[-1] > 0 else None,
        }


@dataclass
class Profile:
    """What one pass over a run's samples adds up to."""

    whole: dict[str, _Sums] = field(default_factory=dict)  # by task
    heavy: dict[str, _Sums] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # one per sample, see sample_measures
    layers: int = 0
    heads: int = 0

    def total(self, which: dict[str, _Sums]) -> _Sums:
        result = _Sums.empty(self.layers, self.heads)
        for task in sorted(which):
            result = result.plus(which[task])
        return result

    def histogram(self) -> Floats:
        """(64,) mean share of a head's kept entries in each bin."""
        total = self.total(self.whole)
        return total.histogram.sum(axis=(0, 1)) / max(total.samples.sum(), 1)

    def layer_occupancy(self) -> Floats:
        """(layers, 64) mean share of a bin's positions that a head of the layer kept."""
        total = self.total(self.whole)
        return total.occupancy.mean(axis=1) / max(total.count, 1)


def profile(samples: Iterable[KeptSample], recent: int | None = None) -> Profile:
    """Read every sample once. `recent`: positions of the forced recent window; None: as observed in each
    sample.
    """
    result = Profile()
    for sample in samples:
        layers, heads = sample.prompt.shape[:2]
        result.layers, result.heads = layers, heads
        whole = result.whole.setdefault(sample.task, _Sums.empty(layers, heads))
        if sample.binned:
            counts = sample.counts()
            position = retention.shares(counts) @ ((np.arange(BINS) + 0.5) / BINS)
            whole.add(counts, counts @ _BINS_TO_TENTHS, position, sample.n)
        else:
            kept = sample.kept()
            whole.add(*_figures(kept), sample.n)
            window = retention.recent_window(kept) if recent is None else min(recent, sample.n)
            if window < sample.n:
                heavy = result.heavy.setdefault(sample.task, _Sums.empty(layers, heads))
                heavy.add(*_figures(retention.domain(kept, window)), sample.n - window)
        result.rows.append(sample_measures(sample, recent))
    return result


def _figures(kept: NDArray[np.bool_]) -> tuple[NDArray[np.int64], Floats, Floats]:
    tenths = retention.bin_counts(kept, 10).astype(float)
    return retention.bin_counts(kept), tenths, retention.mean_position(kept)


def sample_measures(sample: KeptSample, recent: int | None = None) -> dict[str, Any]:
    """One sample as one row of a table (means over its layers and heads), for bootstrap intervals and
    notebooks.
    """
    counts = sample.counts()
    row: dict[str, Any] = {
        **dict(zip(("task", "id", "prompt_hash"), sample.key, strict=True)),
        "n": sample.n,
        "kept": float(counts.sum(axis=-1).mean()),
        "generated": float(sample.generated.mean()),
    }
    if sample.binned:
        return row
    kept = sample.kept()
    window = retention.recent_window(kept) if recent is None else min(recent, sample.n)
    row["recent"] = window
    for name, exclude in (("", 0), ("heavy_", window)):
        tenths = retention.decile_shares(kept, exclude).reshape(-1, 10)
        row[f"{name}first_decile"] = retention.nan_mean(tenths[:, 0])
        row[f"{name}last_decile"] = retention.nan_mean(tenths[:, -1])
        row[f"{name}mean_position"] = retention.nan_mean(retention.mean_position(kept, exclude))
    row["drift"] = retention.nan_mean(retention.drift(kept, sample.kept("end")))
    return row


def summarise(samples: Iterable[KeptSample] | Profile, recent: int | None = None) -> dict[str, Any]:
    """The `retention` part of metrics.json."""
    data = samples if isinstance(samples, Profile) else profile(samples, recent)
    if not data.rows:
        return {}
    whole, heavy = data.total(data.whole), data.total(data.heavy)
    layers = range(data.layers)
    return {
        "samples": len(data.rows),
        "kept_whole": sum(row["kept"] == row["n"] for row in data.rows),
        "kept_mean": _mean(data.rows, "kept"),
        "recent_mean": _mean(data.rows, "recent"),
        "generated_mean": _mean(data.rows, "generated"),
        "drift": _mean(data.rows, "drift"),
        **(whole.measures() or {}),
        "histogram": rounded(data.histogram()),
        "heavy": _heavy(heavy),
        "per_layer": _columns([whole.measures(layer) for layer in layers]),
        "heavy_per_layer": _columns([heavy.measures(layer) for layer in layers]) if heavy.count else None,
        "per_head": _grid(whole, data),
        "heavy_per_head": _grid(heavy, data) if heavy.count else None,
        "per_task": {task: _task(task, data) for task in sorted(data.whole)},
    }


def _heavy(sums: _Sums) -> dict[str, Any] | None:
    measures = sums.measures()
    return None if measures is None else {"samples": sums.count, **measures}


def _task(task: str, data: Profile) -> dict[str, Any]:
    rows = [row for row in data.rows if row["task"] == task]
    heavy = data.heavy.get(task)
    return {
        "samples": len(rows),
        "kept_mean": _mean(rows, "kept"),
        "drift": _mean(rows, "drift"),
        **(data.whole[task].measures() or {}),
        "heavy": _heavy(heavy) if heavy else None,
    }


def _columns(rows: list[dict[str, Any] | None]) -> dict[str, list[Any]]:
    """Measures of every layer as one list per measure; deciles as first and last only."""
    scalar = ("mean_position", "kl_uniform", "gini")
    columns = {name: [row and row[name] for row in rows] for name in scalar}
    for name, place in (("first_decile", 0), ("last_decile", -1)):
        columns[name] = [row and row["decile_shares"][place] for row in rows]
    return columns


def _grid(sums: _Sums, data: Profile) -> dict[str, list[list[Any]]]:
    """The same per head: lists over layers of lists over KV heads."""
    rows = [_columns([sums.measures((i, j)) for j in range(data.heads)]) for i in range(data.layers)]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    mean = retention.nan_mean([row[name] for row in rows if row.get(name) is not None])
    return None if mean is None else rounded(mean)


def rounded(value: Any) -> Any:
    return np.round(value, DIGITS).tolist()
