"""A study's tables, out of finished runs (`python -m src.study` says what is in them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.compare.intervals import RESAMPLES, Array, bootstrap_intervals, holm, sign_flip_pvalues
from src.compare.matched import Study, fidelity, make_study
from src.compare.runs import cell_columns
from src.errors import InputError
from src.records.record import Record
from src.study.retention_tables import octave_table, retention_table

Read = Callable[[Record], Any]
MEASURES: dict[str, Read] = {
    "score": lambda record: record.score,
    **{name: fidelity(name) for name in ("nll", "kl", "top1", "output_error")},
}
SIZES: dict[str, Read] = {
    "kv_bytes": lambda record: record.kv_bytes,
    "kv_bytes_peak": lambda record: record.kv_bytes_peak,
    "kv_bytes_full": lambda record: record.kv_bytes_full,
    "bookkeeping_bytes": lambda record: record.bookkeeping_bytes,
    "kv_bytes_device": lambda record: record.kv_bytes_device,
    "codebook_bytes": lambda record: record.measures.get("codebook_bytes"),
    "chosen_share": lambda record: record.measures.get("chosen_share"),
}
COMPARED = ("score", "kl", "nll")
TABLES = ("cells", "retention", "octaves", "differences")


def collect(
    folders: Sequence[Path], baseline: str | None = None, min_prompt: int = 0, resamples: int = RESAMPLES
) -> tuple[dict[str, pd.DataFrame], Study]:
    """The tables of the finished runs below these folders.

    Args:
        baseline: what `differences` are against, at equal budget; None: the full cache, or nothing without it.
        min_prompt: samples with shorter prompts (in tokens) are left out.

    Raises:
        InputError: no finished run, runs that cannot be compared, an older retention file, no sample left.
    """
    study = long_enough(make_study(folders, baseline), min_prompt)
    tables = {
        "cells": cells(study, resamples),
        "retention": retention_table(study, resamples),
        "octaves": octave_table(study, resamples),
        "differences": differences(study, baseline, resamples),
    }
    return tables, study


def long_enough(study: Study, min_prompt: int) -> Study:
    """The study without its samples of fewer than `min_prompt` prompt tokens."""
    lengths = np.nanmax(study.values(lambda record: record.prompt_tokens), axis=1)
    rows = np.flatnonzero(~(lengths < min_prompt))
    if not rows.size:
        raise InputError(f"--min-prompt {min_prompt}: no sample is that long; the longest has {np.nanmax(lengths):.0f}")
    keys = tuple(study.keys[row] for row in rows)
    runs = tuple(
        replace(run, records={key: run.records[key] for key in keys if key in run.records}) for run in study.runs
    )
    tasks = tuple(sorted({key[0] for key in keys}))
    task_of = np.array([tasks.index(key[0]) for key in keys], dtype=int)
    return replace(study, runs=runs, keys=keys, tasks=tasks, scores=study.scores[rows], task_of=task_of)


def cells(study: Study, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Scores, fidelity and sizes of every run, over all tasks and for each."""
    values = {name: study.values(read) for name, read in {**MEASURES, **SIZES}.items()}
    lengths = study.values(lambda record: record.prompt_tokens)
    found = []
    for task in (None, *range(len(study.tasks))):
        rows = np.full(len(study.keys), True) if task is None else study.task_of == task
        intervals = {
            name: bootstrap_intervals(values[name][rows], study.task_of[rows], resamples=resamples) for name in MEASURES
        }
        for column, run in enumerate(study.runs):
            score = intervals["score"][column]
            own = [record for key, record in run.records.items() if task is None or key[0] == study.tasks[task]]
            line = cell_columns(run) | {
                "task": "all" if task is None else study.tasks[task],
                "n": score.n,
                "failed": sum(bool(record.error) for record in own),
                "prompt_tokens": mean(lengths[rows, column]),
            }
            for name in MEASURES:
                interval = intervals[name][column]
                line |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
            line["stderr"] = score.stderr
            found.append(line | {name: mean(values[name][rows, column]) for name in SIZES})
    return pd.DataFrame(found)


def mean(values: Array) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def differences(study: Study, baseline: str | None, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Every run minus the baseline at its budget, or minus the full cache."""
    found = []
    for name in COMPARED:
        values = study.values(MEASURES[name])
        pairs = []
        for column, run in enumerate(study.runs):
            other = study.full if baseline is None else study.column(str(study.baseline), run.budget)
            if other is not None and other != column and not run.full:
                pairs.append((column, other))
        if not pairs or np.isnan(values).all():
            continue
        gaps = np.stack([values[:, a] - values[:, b] for a, b in pairs], axis=1)
        intervals = bootstrap_intervals(gaps, study.task_of, resamples=resamples)
        pvalues = sign_flip_pvalues(gaps, study.task_of, resamples=resamples).tolist()
        for (column, other), gap, p, corrected in zip(pairs, intervals, pvalues, holm(pvalues), strict=True):
            line = {"against": study.runs[other].label, "measure": name, "n": gap.n, "difference": gap.estimate}
            line |= {"low": gap.low, "high": gap.high, "p": p, "p_holm": corrected}
            found.append(cell_columns(study.runs[column]) | line)
    columns = ["model", "policy", "options", "budget", "against", "measure", "n", "difference", "low", "high"]
    return pd.DataFrame(found, columns=[*columns, "p", "p_holm"])


def readme(study: Study, commands: Sequence[str], own: str, name: str) -> str:
    """What a reader of the tables must know."""
    gits = [run.environment["git"] for run in study.runs if run.environment.get("git")]
    versions = sorted({f"{git['commit'][:12]}{' (changed)' if git.get('changed') else ''}" for git in gits})
    lengths = [r.prompt_tokens for run in study.runs for r in run.records.values() if r.prompt_tokens]
    lines = [f"# {name}", "", "Made by", "", *(f"    {command}" for command in (*commands, own)), ""]
    lines += [
        f"- model: {study.model}",
        f"- samples: {study.scored} of {len(study.tasks)} tasks ({', '.join(study.tasks)})",
        f"- prompts: {min(lengths):,} to {max(lengths):,} tokens" if lengths else "- prompts: no lengths recorded",
        f"- code: commit {', '.join(versions) or 'not recorded'}",
        *(f"- {key}: {value}" for key, value in study.comparability.items() if key != "task_versions"),
        *(f"- note: {warning}" for warning in study.warnings),
        "",
        "The columns are explained in src/study/__main__.py.",
    ]
    return "\n".join(lines) + "\n"
