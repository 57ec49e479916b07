"""Intervals and tests for paired comparisons over several tasks. Pure functions on numpy arrays.

The quantity is always the macro average: the mean over tasks of the mean over a task's samples, as
papers report it. `values` has one row per sample and one column per quantity (a policy's score, or its
difference to another policy); NaN means that this sample is missing in this column. `tasks` says which
task each row belongs to.

What was chosen, and why:

* Intervals: a bootstrap that resamples within each task, since tasks are fixed and samples are drawn. A
  plain bootstrap of n samples has a variance too small by (n-1)/n, which hurts when a task has ten
  samples; drawing n-1 of n with replacement removes that bias (Rao and Wu 1988). The percentiles are then
  widened from the normal to Student's t with the degrees of freedom of Welch and Satterthwaite
  (Hesterberg 2015, "expanded percentile"). With many samples both corrections vanish and the ordinary
  percentile bootstrap remains.
* Tests: a paired sign-flip permutation test, not a bootstrap p-value. If two policies were equally good on
  a sample, the sign of their difference there would be a coin toss; flipping signs gives the distribution
  of the average difference under that hypothesis, exactly for few samples, where bootstrap p-values are
  too small.
* Several policies are compared with one other, so p-values are corrected after Holm (1979), which
  needs no independence: all comparisons share that one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from src.errors import InputError

Array = NDArray[np.float64]

RESAMPLES = 10_000
FEWEST, MOST = 1_000, 1_000_000  # resamples: below it intervals are noise themselves, above it nothing changes any more
EXACT_UP_TO = 13  # non-zero differences: 2^13 sign patterns are fewer than the resamples, so all are visited
CELLS = 4_000_000  # entries of the largest temporary array


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval and standard error; NaN where the data cannot say."""

    estimate: float
    low: float
    high: float
    stderr: float
    n: int  # samples behind it


def macro_mean(values: Array, tasks: NDArray[np.int_]) -> Array:
    """Mean over tasks of the mean within each task, per column. A task that a column lacks is left out."""
    means = [_mean_of_present(values[tasks == task]) for task in np.unique(tasks)]
    return _mean_of_present(np.array(means)) if means else np.full(values.shape[1], np.nan)


def macro_stderr(values: Array, tasks: NDArray[np.int_]) -> tuple[Array, Array]:
    """Standard error of the macro average per column, and its Welch-Satterthwaite degrees of freedom.

    NaN where a task has a single sample: its spread is unknown, and leaving it out would feign certainty.
    """
    columns = values.shape[1]
    variance, spread, count = np.zeros(columns), np.zeros(columns), np.zeros(columns)
    for task in np.unique(tasks):
        rows = values[tasks == task]
        n = (~np.isnan(rows)).sum(axis=0)
        centred = np.where(np.isnan(rows), 0.0, rows - _mean_of_present(rows))
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(n > 0, (centred**2).sum(axis=0) / (n - 1) / n, 0.0)
            spread += np.where(n > 0, part**2 / (n - 1), 0.0)
        variance += part
        count += n > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        stderr = np.sqrt(variance) / count
        freedom = np.where(variance > 0, variance**2 / spread, np.inf)
    return stderr, np.where(np.isnan(stderr), np.nan, freedom)


def bootstrap_intervals(
    values: Array, tasks: NDArray[np.int_], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """A confidence interval of the macro average for every column (see the head of this file).

    Columns that miss the same samples share their draws. A column of paired differences gets the paired
    interval: resampling pairs is resampling their differences.
    """
    from scipy.stats import norm, t  # as long to import as all else that `python -m src.report --help` needs

    estimates, (errors, freedom) = macro_mean(values, tasks), macro_stderr(values, tasks)
    counts = (~np.isnan(values)).sum(axis=0)
    low, high = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    patterns: dict[bytes, list[int]] = {}
    for column in range(values.shape[1]):
        if not np.isnan(errors[column]):
            patterns.setdefault(np.isnan(values[:, column]).tobytes(), []).append(column)
    wide = max(1, CELLS // resamples)  # columns whose draws are held at once; each meets the same draws anyway
    for columns in (group[i : i + wide] for group in patterns.values() for i in range(0, len(group), wide)):
        present = ~np.isnan(values[:, columns[0]])
        draws = np.sort(_resample(values[present][:, columns], tasks[present], resamples, seed), axis=0)
        tail = norm.cdf(t.ppf((1 - level) / 2, freedom[columns]))
        ranks = tail * (resamples - 1)
        for position, column in enumerate(columns):
            lower, upper = np.floor(ranks[position]), np.ceil(resamples - 1 - ranks[position])
            low[column], high[column] = draws[int(lower), position], draws[int(upper), position]
    return [
        Interval(float(estimates[i]), float(low[i]), float(high[i]), float(errors[i]), int(counts[i]))
        for i in range(values.shape[1])
    ]


def check_resamples(count: int) -> int:
    """The count, if intervals can be made from so many resamples. Raises InputError."""
    if not FEWEST <= count <= MOST:
        why = "intervals from fewer are noise themselves" if count < FEWEST else "more change no interval"
        raise InputError(f"--resamples {count}: {why}; valid: {FEWEST} to {MOST}")
    return count


def sign_flip_pvalues(differences: Array, tasks: NDArray[np.int_], resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Two-sided p-value per column of "paired differences are symmetric around zero", by flipping signs.

    Exact (every sign pattern) for up to 13 non-zero differences; otherwise from random patterns, counting
    the observed one among them so that a p-value is never zero. NaN for a column without any pair.
    """
    weighted = np.zeros_like(differences)
    for task in np.unique(tasks):
        rows = differences[tasks == task]
        n = np.maximum((~np.isnan(rows)).sum(axis=0), 1)
        weighted[tasks == task] = np.where(np.isnan(rows), 0.0, rows) / n
    observed = np.abs(weighted.sum(axis=0))
    limit = observed - 1e-9 * np.abs(weighted).sum(axis=0)  # equal sums may differ in the last bits
    nonzero = (weighted != 0).sum(axis=0)
    pvalues = np.full(differences.shape[1], np.nan)
    sampled = []
    for column in np.flatnonzero((~np.isnan(differences)).any(axis=0)):
        if nonzero[column] > EXACT_UP_TO:
            sampled.append(column)
            continue
        steps = weighted[weighted[:, column] != 0, column]
        patterns = (np.arange(2 ** len(steps))[:, None] >> np.arange(len(steps))) & 1
        pvalues[column] = np.mean(np.abs((2.0 * patterns - 1) @ steps) >= limit[column])
    if sampled:
        extreme = np.zeros(len(sampled))
        generator, done = np.random.default_rng([seed, 1]), 0
        while done < resamples:
            block = min(resamples - done, max(1, CELLS // len(weighted)))
            signs = generator.integers(0, 2, (block, len(weighted)), dtype=np.int8) * 2.0 - 1
            extreme += (np.abs(signs @ weighted[:, sampled]) >= limit[sampled]).sum(axis=0)
            done += block
        pvalues[sampled] = (extreme + 1) / (resamples + 1)
    return pvalues


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m times m - i, in order, at most 1. NaN stays."""
    adjusted = [float("nan")] * len(pvalues)
    order = sorted((i for i, p in enumerate(pvalues) if not np.isnan(p)), key=lambda i: pvalues[i])
    floor = 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(order) - rank) * pvalues[i]))
        adjusted[i] = floor
    return adjusted


def _mean_of_present(rows: Array) -> Array:
    """Column means without NaN entries, NaN for an empty column (and no warning, unlike numpy.nanmean)."""
    present = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return np.where(present, rows, 0.0).sum(axis=0) / present.sum(axis=0)


def _resample(values: Array, tasks: NDArray[np.int_], resamples: int, seed: int) -> Array:
    """Macro averages of the bootstrap samples, (resamples, columns): n-1 draws of a task's n samples each."""
    names = np.unique(tasks)
    total = np.zeros((resamples, values.shape[1]))
    for task in names:
        rows = values[tasks == task]
        n, generator, done = len(rows), np.random.default_rng([seed, int(task)]), 0
        while done < resamples:
            block = min(resamples - done, max(1, CELLS // n))
            picks = generator.integers(0, n, (block, n - 1)) + np.arange(block)[:, None] * n
            draws = np.bincount(picks.ravel(), minlength=block * n).reshape(block, n) / (n - 1)
            total[done : done + block] += draws @ rows
            done += block
    return total / len(names)
