"""The numbers of a report: averages with intervals, paired differences, fidelity and memory of every run."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from src.compare.intervals import RESAMPLES, Array, Interval, bootstrap_intervals, holm, sign_flip_pvalues
from src.compare.matched import Study, fidelity
from src.compare.runs import Run

CLEAR = 0.05  # a corrected p-value below it is called a clear difference
FIDELITY = ("kl", "nll", "top1", "output_error")


@dataclass(frozen=True)
class Difference:
    """A run minus another on the samples that both have."""

    interval: Interval
    p: float
    p_holm: float

    @property
    def clear(self) -> bool:
        return self.p_holm < CLEAR


@dataclass(frozen=True)
class Row:
    """Everything said about one run."""

    run: Run
    average: Interval
    tasks: dict[str, tuple[float, int]]  # mean score and scored samples
    failed: int
    odd: bool  # rests on other samples than most runs
    full: Difference | None
    baseline: Difference | None
    fidelity: dict[str, Interval] = field(default_factory=dict)

    def memory(self, name: str) -> float | None:
        value = (self.run.metrics.get("memory") or {}).get(name)
        return float(value) if isinstance(value, int | float) else None

    @property
    def bookkeeping(self) -> float:
        """Bytes of positions and of the policy's own state, per sample."""
        return self.memory("bookkeeping_bytes_mean") or 0.0

    @property
    def total_bytes(self) -> float | None:
        """Entries after the prompt and bookkeeping, wherever they lie, per sample."""
        entries = self.memory("kv_bytes_mean")
        return None if entries is None else entries + self.bookkeeping

    @property
    def device_bytes(self) -> float | None:
        """The part of the total on the device: all of it, unless the policy holds something in host memory."""
        entries = self.memory("kv_bytes_device_mean")
        return self.total_bytes if entries is None else entries + self.bookkeeping

    def share(self, size: float | None) -> float | None:
        """Of the bytes of the full cache's entries, on the same samples."""
        full = self.memory("kv_bytes_full_mean")
        return size / full if size is not None and full else None

    @property
    def total_share(self) -> float | None:
        return self.share(self.total_bytes)


@dataclass(frozen=True)
class Analysis:
    study: Study
    rows: tuple[Row, ...]  # in the order of study.runs
    resamples: int
    seed: int

    @property
    def full(self) -> Row | None:
        return next((row for row in self.rows if row.run.full), None)

    @property
    def budgeted(self) -> list[Row]:
        return [row for row in self.rows if not row.run.full]

    def at(self, budget: Any) -> list[Row]:
        return [row for row in self.budgeted if row.run.budget == budget]

    def best(self, rows: Iterable[Row]) -> Row | None:
        """The highest average among runs over the same samples; None where there is nothing to choose."""
        fair = [row for row in rows if not row.odd and not np.isnan(row.average.estimate)]
        return max(fair, key=lambda row: row.average.estimate) if fair else None

    @property
    def has_fidelity(self) -> bool:
        return any(row.fidelity for row in self.rows)

    @property
    def failed(self) -> int:
        return sum(row.failed for row in self.rows)


def analyse(study: Study, resamples: int = RESAMPLES, seed: int = 0) -> Analysis:
    """All intervals of one kind come from one call, so that every run meets the same resamples."""
    runs, scores, width = study.runs, study.scores, len(study.runs)
    opponents = (
        [None if run.full else study.full for run in runs],
        [
            None if run.full or study.baseline in (None, run.label) else study.column(study.baseline, run.budget)
            for run in runs
        ],
    )
    to_full, to_baseline = (_differences(scores, wanted) for wanted in opponents)
    together = np.hstack([scores, to_full, to_baseline])
    intervals = bootstrap_intervals(together, study.task_of, resamples=resamples, seed=seed)
    pvalues = sign_flip_pvalues(together[:, width:], study.task_of, resamples=resamples, seed=seed)
    differences = [
        _corrected(intervals[width * (i + 1) : width * (i + 2)], pvalues[width * i : width * (i + 1)]) for i in (0, 1)
    ]
    sampled = Counter((~np.isnan(scores[:, i])).tobytes() for i in range(width))
    usual = sampled.most_common(1)[0][0]
    distances = _fidelity(study, resamples, seed)
    rows = [
        Row(
            run=run,
            average=intervals[i],
            tasks=_task_means(study, i),
            failed=study.failed(i),
            odd=(~np.isnan(scores[:, i])).tobytes() != usual,
            full=differences[0][i],
            baseline=differences[1][i],
            fidelity={name: found[i] for name, found in distances.items() if found[i].n},
        )
        for i, run in enumerate(runs)
    ]
    return Analysis(study, tuple(rows), resamples, seed)


def _differences(scores: Array, others: list[int | None]) -> Array:
    columns = [
        np.full(len(scores), np.nan) if other is None else scores[:, i] - scores[:, other]
        for i, other in enumerate(others)
    ]
    return np.stack(columns, axis=1)


def _corrected(intervals: list[Interval], pvalues: Array) -> list[Difference | None]:
    """Holm over every comparison with the same other run: all policies at all budgets are one family."""
    adjusted = holm([float(p) for p in pvalues])
    return [
        Difference(interval, float(p), corrected) if interval.n else None
        for interval, p, corrected in zip(intervals, pvalues, adjusted, strict=True)
    ]


def _task_means(study: Study, column: int) -> dict[str, tuple[float, int]]:
    means = {}
    for index, task in enumerate(study.tasks):
        scores = study.scores[study.task_of == index, column]
        scores = scores[~np.isnan(scores)]
        if len(scores):
            means[task] = (float(scores.mean()), len(scores))
    return means


def _fidelity(study: Study, resamples: int, seed: int) -> dict[str, list[Interval]]:
    found = {}
    for name in FIDELITY:
        values = study.values(fidelity(name))
        if not np.isnan(values).all():
            found[name] = bootstrap_intervals(values, study.task_of, resamples=resamples, seed=seed)
    return found
