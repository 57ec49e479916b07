"""Retention of a whole run: one pass over its samples, then the figures for metrics.json, W&B and the plots.

Every sample, layer and head weighs the same: a head's shares are of its own kept entries, and means are over
heads, layers and samples. KL and Gini are those of the mean shares (of the group they are quoted for), so
they describe the histogram that is drawn; single heads of single samples are far from uniform for any policy.
`heavy` leaves out each sample's recent window: `recent` positions, or, by default, the last positions that
all layers and heads kept. Samples whose prompt was kept whole have no heavy part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.retention import measures as retention
from src.retention.per_head import PER_HEAD
from src.retention.store import BINS, KeptSample

Floats = NDArray[np.float64]
DIGITS = 5

# Share of 64-bin counts that falls in each tenth, positions spread evenly in their bin: only for
# retention=bins.
_EDGES = np.arange(BINS + 1) * 10 / BINS
BINS_TO_TENTHS = np.clip(
    np.minimum(_EDGES[1:, None], np.arange(1, 11)) - np.maximum(_EDGES[:-1, None], np.arange(10)), 0, None
) * (BINS / 10)


@dataclass
class _Sums:
    """Sums over samples of (layers, kv_heads, ...) shares, and how many samples each head contributed."""

    histogram: Floats
    tenths: Floats
    per_head: Floats  # (measures, layers, kv_heads), as PER_HEAD has them
    occupancy: Floats
    samples: Floats  # (layers, kv_heads)
    drift: Floats  # (layers, kv_heads)
    drifted: Floats  # (layers, kv_heads), how many samples each head's drift is of
    positions: Floats  # (64,) positions per bin / positions, summed over samples
    count: int = 0

    @classmethod
    def empty(cls, layers: int, heads: int) -> _Sums:
        bins, tenths = np.zeros((layers, heads, BINS)), np.zeros((layers, heads, 10))
        one = [np.zeros((layers, heads)) for _ in range(3)]
        per_head = np.zeros((len(PER_HEAD), layers, heads))
        return cls(bins, tenths, per_head, bins.copy(), one[0], one[1], one[2], np.zeros(BINS))

    def add(self, of: _Figures) -> None:
        there = of.counts.sum(axis=-1) > 0
        if not there.any():
            return
        capacity = retention.capacity(of.n)
        self.histogram += np.nan_to_num(retention.shares(of.counts))
        self.tenths += np.nan_to_num(retention.shares(of.tenths))
        self.per_head += np.nan_to_num(of.per_head)
        self.occupancy += of.counts / np.maximum(capacity, 1)
        self.samples += there
        self.positions += capacity / of.n
        self.count += 1

    def add_drift(self, drift: Floats) -> None:
        self.drift += np.nan_to_num(drift)
        self.drifted += ~np.isnan(drift)

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def measures(self, group: Any = ()) -> dict[str, Any] | None:
        """The figures of a group of heads, chosen by an index into (layers, kv_heads)."""
        samples = self.samples[group].sum()
        if not samples:
            return None
        axes = tuple(range(self.samples[group].ndim))
        drifted = self.drifted[group].sum()
        histogram, tenths = (x[group].sum(axis=axes) / samples for x in (self.histogram, self.tenths))
        return {
            "decile_shares": rounded(tenths),
            **{name: rounded(sums[group].sum() / samples) for name, sums in zip(PER_HEAD, self.per_head, strict=True)},
            "kl_uniform": rounded(retention.kl_to_uniform(histogram, self.positions)),
            "gini": rounded(retention.gini(histogram, self.positions)),
            "first_to_last_decile": rounded(tenths[0] / tenths[-1]) if tenths[-1] > 0 else None,
            "drift": rounded(self.drift[group].sum() / drifted) if drifted else None,
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
    """Read every sample once. `recent`: positions of the forced window; None: as observed in each sample."""
    result = Profile()
    for sample in samples:
        result.layers, result.heads = sample.prompt.shape[:2]
        row, whole, heavy, drift = _measured(sample, recent)
        result.rows.append(row)
        for sums, figures in ((result.whole, whole), (result.heavy, heavy)):
            if figures is not None:
                sums.setdefault(sample.task, _Sums.empty(result.layers, result.heads)).add(figures)
        if drift is not None:
            result.whole[sample.task].add_drift(drift)
    return result


def sample_measures(sample: KeptSample, recent: int | None = None) -> dict[str, Any]:
    """One sample as one row of a table (means over layers and heads): for bootstrap intervals, notebooks."""
    return _measured(sample, recent)[0]


@dataclass(frozen=True)
class _Figures:
    """Of one sample, per layer and head: entries per bin and tenth, and PER_HEAD's measures; over n positions."""

    counts: NDArray[np.int64]
    tenths: Floats
    per_head: Floats  # (measures, layers, kv_heads)
    n: int


def _measured(
    sample: KeptSample, recent: int | None
) -> tuple[dict[str, Any], _Figures, _Figures | None, Floats | None]:
    """The table row, the figures of the whole prompt and of the heavy part, the drift per layer and head."""
    row: dict[str, Any] = dict(zip(("task", "id", "prompt_hash"), sample.key, strict=True))
    row |= {"n": sample.n, "generated": float(sample.generated.mean())}
    if sample.binned:
        counts = sample.counts()
        shares = retention.shares(counts)
        per_head = np.stack([measure.of_shares(shares) for measure in PER_HEAD.values()])
        whole = _Figures(counts, counts @ BINS_TO_TENTHS, per_head, sample.n)
        return row | {"kept": _entries(whole)}, whole, None, None
    kept = sample.kept()
    whole = _figures(kept)
    window = retention.recent_window(kept) if recent is None else min(recent, sample.n)
    heavy = _figures(retention.domain(kept, window)) if window < sample.n else None
    same = sample.end is sample.prompt
    drift = np.zeros(kept.shape[:-1]) if same else retention.drift(kept, sample.kept("end"))
    row |= {"kept": _entries(whole), "recent": window, "drift": retention.nan_mean(drift)}
    for name, figures in (("", whole), ("heavy_", heavy)):
        tenths = retention.shares(figures.tenths) if figures else np.full((1, 1, 10), np.nan)
        row[f"{name}first_decile"] = retention.nan_mean(tenths[..., 0])
        row[f"{name}last_decile"] = retention.nan_mean(tenths[..., -1])
        for place, measure in enumerate(PER_HEAD):
            row[f"{name}{measure}"] = retention.nan_mean(figures.per_head[place]) if figures else None
    return row, whole, heavy, drift


def _figures(kept: NDArray[np.bool_]) -> _Figures:
    tenths = retention.bin_counts(kept, 10).astype(float)
    per_head = np.stack([measure.of_kept(kept) for measure in PER_HEAD.values()])
    return _Figures(retention.bin_counts(kept), tenths, per_head, kept.shape[-1])


def _entries(figures: _Figures) -> float:
    return float(figures.counts.sum(axis=-1).mean())


def summarise(samples: Iterable[KeptSample] | Profile, recent: int | None = None) -> dict[str, Any]:
    """The `retention` part of metrics.json."""
    data = samples if isinstance(samples, Profile) else profile(samples, recent)
    if not data.rows:
        return {}
    whole, heavy = data.total(data.whole), data.total(data.heavy)
    layers = range(data.layers)
    counts = sum("recent" not in row for row in data.rows)  # retention=bins
    return {
        "samples": len(data.rows),
        **({"only_counts": counts} if 0 < counts < len(data.rows) else {}),
        "kept_whole": sum(row["kept"] == row["n"] for row in data.rows),
        "kept_mean": _mean(data.rows, "kept"),
        "recent_mean": _mean(data.rows, "recent"),
        "generated_mean": _mean(data.rows, "generated"),
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
    if measures is None:
        return None
    del measures["drift"]  # is of the whole prompt
    return {"samples": sums.count, **measures}


def _task(task: str, data: Profile) -> dict[str, Any]:
    rows = [row for row in data.rows if row["task"] == task]
    heavy = data.heavy.get(task)
    return {
        "samples": len(rows),
        "kept_mean": _mean(rows, "kept"),
        **(data.whole[task].measures() or {}),
        "heavy": _heavy(heavy) if heavy else None,
    }


def _columns(rows: list[dict[str, Any] | None]) -> dict[str, list[Any]]:
    """Measures of every layer as one list per measure; deciles as first and last only."""
    scalar = (*PER_HEAD, "kl_uniform", "gini", "drift")
    columns = {name: [row and row[name] for row in rows] for name in scalar}
    if all(value is None for value in columns["drift"]):
        del columns["drift"]
    for name, place in (("first_decile", 0), ("last_decile", -1)):
        columns[name] = [row and row["decile_shares"][place] for row in rows]
    return columns


def _grid(sums: _Sums, data: Profile) -> dict[str, list[Any]]:
    """The same per head: lists over layers of lists over KV heads."""
    rows: list[dict[str, list[Any]]] = [
        _columns([sums.measures((i, j)) for j in range(data.heads)]) for i in range(data.layers)
    ]
    return {name: [row.get(name) for row in rows] for name in rows[0]}


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    mean = retention.nan_mean([row[name] for row in rows if row.get(name) is not None])
    return None if mean is None else rounded(mean)


def rounded(value: Any) -> Any:
    return np.round(value, DIGITS).tolist()
