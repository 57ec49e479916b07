"""The part of a study's tables that is about kept positions and scores by position (see src/study/__main__.py)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from src.compare.intervals import CELLS, RESAMPLES, Array, Interval, bootstrap_intervals
from src.compare.matched import Study
from src.compare.runs import Run, cell_columns
from src.retention import measures as retention
from src.retention.profile import BINS_TO_TENTHS
from src.retention.store import BINS, KeptSample, Key, load_retention

DECILES = tuple(f"decile_{i:02}" for i in range(1, 11))
COLUMNS = ["model", "policy", "options", "budget"]


def retention_table(study: Study, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Where the kept entries of each run lie, and how its scores depend on the position."""
    wanted, found = set(study.keys), []
    for run in study.runs:
        if run.full or not (run.folder / "retention.npz").exists():
            continue
        file = load_retention(run.folder)
        samples = [file.sample(key) for key in file.keys if key in wanted]
        file.close()
        rows: list[tuple[str, str, int, float, float, float]] = []
        for part in ("all", "heavy"):
            figures = np.array([kept_figures(sample, part) for sample in samples]).reshape(len(samples), 11)
            rows += [(part, *row) for row in with_intervals(figures, resamples)]
        picked = chosen_shares(run, wanted)
        rows += [("chosen", name, len(picked), *row) for name, row in chosen_rows(picked, resamples)]
        single = {"drift": [drifted(sample) for sample in samples], **needles(run, samples), **slopes(run, wanted)}
        for name, values in single.items():
            if values:
                (interval,) = one_group(np.array(values).reshape(-1, 1), resamples)
                rows.append(("all", name, interval.n, interval.estimate, interval.low, interval.high))
        names = ("part", "measure", "n", "value", "low", "high")
        found += [cell_columns(run) | dict(zip(names, row, strict=True)) for row in rows]
    return pd.DataFrame(found, columns=[*COLUMNS, "part", "measure", "n", "value", "low", "high"])


def one_group(values: Array, resamples: int) -> list[Interval]:
    """Intervals over samples of all tasks alike: every sample weighs the same, as in metrics.json."""
    return bootstrap_intervals(values, np.zeros(len(values), dtype=int), resamples=resamples)


def needles(run: Run, samples: list[KeptSample]) -> dict[str, list[float]]:
    """Of each sample's answering sentence, where it is known, the share kept: mean over layers and heads."""
    found: dict[str, list[float]] = {"needle": [], "needle_end": []}
    for sample in samples:
        span = run.records[sample.key].needle
        if span and not sample.binned:
            for name, moment in (("needle", "prompt"), ("needle_end", "end")):
                found[name].append(float(retention.share_of_span_kept(sample.kept(moment), *span).mean()))
    return found


def chosen_shares(run: Run, wanted: set[Key]) -> Array:
    """`(samples, 10)` shares of the chosen tokens in each tenth of the prompt, where a policy chooses at each step."""
    records = [record for key, record in run.records.items() if key in wanted]
    bins = [found for r in records if any(found := r.measures.get("chosen_positions") or ())]
    return np.array(bins, dtype=float).reshape(-1, BINS) @ BINS_TO_TENTHS


def chosen_rows(shares: Array, resamples: int) -> list[tuple[str, tuple[float, float, float]]]:
    """Measure, and value, low, high."""
    if not len(shares):
        return []
    found = [(i.estimate, i.low, i.high) for i in one_group(shares, resamples)]
    return [*zip(DECILES, found, strict=True), ("first_to_last", ratio_interval(shares[:, 0], shares[:, 9], resamples))]


def slopes(run: Run, wanted: set[Key]) -> dict[str, list[float]]:
    """Slope of ln(score) against ln(position) of each sample, mean over layers and KV heads, and what theory says."""
    records = [record for key, record in run.records.items() if key in wanted]
    found = {}
    for name in ("score_slope", "score_slope_theory"):
        means = [retention.nan_mean(np.array(each, float)) for r in records if (each := r.measures.get(name))]
        found[name] = [mean for mean in means if mean is not None]  # None: scores that have no slope (negative ones)
    return found


def kept_figures(sample: KeptSample, part: str) -> list[float]:
    """One sample's ten decile shares and its mean position, means over layers and heads."""
    kept = sample.kept()
    window = retention.recent_window(kept) if part == "heavy" else 0
    deciles = retention.decile_shares(kept, window).reshape(-1, 10)
    if np.isnan(deciles).all():  # nothing was dropped, or nothing but the recent window kept
        return [float("nan")] * 11
    return [*np.nanmean(deciles, axis=0), float(np.nanmean(retention.mean_position(kept, window)))]


def drifted(sample: KeptSample) -> float:
    """Of the prompt's kept entries, the share that was gone when decoding ended; mean over layers and heads."""
    return float(np.nanmean(retention.drift(sample.kept(), sample.kept("end"))))


def with_intervals(figures: Array, resamples: int) -> Iterator[tuple[str, int, float, float, float]]:
    """Measure, n, value, low, high for `(samples, 11)` figures."""
    figures = figures[~np.isnan(figures).any(axis=1)]
    if not len(figures):
        return
    for name, interval in zip((*DECILES, "mean_position"), one_group(figures, resamples), strict=True):
        yield name, interval.n, interval.estimate, interval.low, interval.high
    yield ("first_to_last", len(figures), *ratio_interval(figures[:, 0], figures[:, 9], resamples))


def ratio_interval(top: Array, bottom: Array, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `top` / mean of `bottom` with its bootstrap interval over samples, corrected as in compare/intervals.py.

    No interval below five samples: resampling so few says nothing about others.
    """
    n = len(top)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(top.sum() / bottom.sum())
        if n < 5:
            return value, float("nan"), float("nan")
        generator, draws = np.random.default_rng(seed), np.empty(resamples)
        for start in range(0, resamples, block := max(1, CELLS // n)):
            picks = generator.integers(0, n, (min(block, resamples - start), n - 1))
            draws[start : start + block] = top[picks].sum(axis=1) / bottom[picks].sum(axis=1)
    tail = norm.cdf(t.ppf(0.025, n - 1))
    low, high = np.quantile(draws, [tail, 1 - tail], method="closest_observation")
    return value, float(low), float(high)


def octave_table(study: Study, resamples: int = RESAMPLES) -> pd.DataFrame:
    """The policies' scores by position; only octaves that all prompts of a run reach."""
    found = []
    for run in study.runs:
        records = [run.records[key] for key in study.keys if key in run.records]
        layers = [np.array(each, float) for r in records if (each := r.measures.get("score_by_octave"))]
        if not layers:
            continue
        common = min(sample.shape[1] for sample in layers)
        means = np.array([[retention.nan_mean(sample[:, i]) for i in range(common)] for sample in layers], dtype=float)
        for octave, interval in enumerate(one_group(means, resamples)):
            if interval.n:
                line = {"first": 2**octave, "n": interval.n, "value": interval.estimate}
                found.append(cell_columns(run) | line | {"low": interval.low, "high": interval.high})
    return pd.DataFrame(found, columns=[*COLUMNS, "first", "n", "value", "low", "high"])
