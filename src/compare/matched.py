"""What a report is made from: comparable runs side by side, matched by sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.compare.intervals import Array
from src.compare.runs import FINGERPRINT, Run, budget_order, check_comparable, find_runs, label_runs, load_run
from src.errors import InputError
from src.records.record import Record
from src.retention.store import Key


@dataclass(frozen=True)
class Study:
    """Comparable runs side by side: a row of `scores` per sample, a column per run, NaN for none."""

    model: str
    runs: tuple[Run, ...]
    tasks: tuple[str, ...]
    keys: tuple[Key, ...]
    scores: Array
    task_of: NDArray[np.int_]
    baseline: str | None
    comparability: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def scored(self) -> int:
        """Samples with a score in at least one run: what the evidence rests on, failures left out."""
        return int((~np.isnan(self.scores)).any(axis=1).sum())

    @property
    def full(self) -> int | None:
        """The column of the full cache."""
        return next((i for i, run in enumerate(self.runs) if run.full), None)

    @property
    def labels(self) -> list[str]:
        """The policies, in the order of the tables, without the full cache."""
        return list(dict.fromkeys(run.label for run in self.runs if not run.full))

    @property
    def budgets(self) -> list[int | float]:
        return list(dict.fromkeys(run.budget for run in self.runs if not run.full and run.budget is not None))

    def shown(self, label: str) -> str:
        """A policy's label as people see it."""
        return next((run.shown for run in self.runs if run.label == label), label)

    def column(self, label: str, budget: int | float | None) -> int | None:
        matches = (i for i, r in enumerate(self.runs) if r.label == label and r.budget == budget and not r.full)
        return next(matches, None)

    def failed(self, column: int) -> int:
        return sum(bool(record.error) for record in self.runs[column].records.values())

    def values(self, read: Callable[[Record], Any]) -> Array:
        """Like `scores`, of another number that `read` finds in a record; of numbers by layer their mean."""
        found = np.full(self.scores.shape, np.nan)
        for column, run in enumerate(self.runs):
            for row, key in enumerate(self.keys):
                record = run.records.get(key)
                value = None if record is None or record.error else read(record)
                if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
                    value = float(np.mean(value))
                if isinstance(value, int | float):
                    found[row, column] = value
        return found


def fidelity(name: str) -> Callable[[Record], Any]:
    """Reads one of a record's fidelity figures, for `Study.values`."""
    return lambda record: (record.fidelity or {}).get(name)


def make_study(folders: Sequence[Path], baseline: str | None = None) -> Study:
    """Find, check, label, order and match the finished runs below these folders."""
    paths, warnings = find_runs(folders)
    runs, damaged = _sound_runs(paths)
    warnings += damaged
    check_comparable(runs)
    runs, more = _single_full(runs)
    runs = label_runs(runs)
    runs.sort(key=lambda r: (not r.full, *budget_order(r.budget), r.policy, r.label))
    keys = sorted({key for run in runs for key in run.records})
    tasks = tuple(sorted({key[0] for key in keys}))
    row_of = {key: row for row, key in enumerate(keys)}
    scores = np.full((len(keys), len(runs)), np.nan)
    for column, run in enumerate(runs):
        for key, record in run.records.items():
            if record.succeeded:
                scores[row_of[key], column] = record.score
    task_of = np.array([tasks.index(key[0]) for key in keys], dtype=int)
    warnings += [
        f"{run.folder.name} was interrupted with {len(missing)} samples missing; launch it again to complete it."
        for run in runs
        if (missing := run.metrics.get("missing"))
    ]
    warnings += _unknown_weights(runs)
    warnings += more + _sample_warnings(runs, keys, scores, task_of)
    chosen = _choose_baseline(runs, baseline)
    comparability = dict(runs[0].metrics.get("comparability") or {})
    return Study(
        runs[0].model,
        tuple(runs),
        tasks,
        tuple(keys),
        scores,
        task_of,
        chosen,
        comparability,
        tuple(warnings),
    )


def _sound_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs whose files can be used, and what is to be said about the others and about these.

    Raises:
        InputError: none can.
    """
    runs: list[Run] = []
    refused: list[InputError] = []
    for path in paths:
        try:
            runs.append(load_run(path))
        except InputError as error:
            refused.append(error)
    if not runs:
        more = f" (and {len(refused) - 1} more runs)" if refused[1:] else ""
        raise InputError(f"{refused[0]}{more}")
    warnings = [f"A run is left out. {error}" for error in refused]
    warnings += [note for run in runs for note in run.notes]
    before = [run.folder.name for run in runs if run.unchecked]
    if before:
        warnings.append(
            f"From before files carried check values, so that damage would go unnoticed: {', '.join(before)}."
        )
    return runs, warnings


def _single_full(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """A budget means nothing to the full cache: of several such runs the one with most samples stays."""
    full = sorted((r for r in runs if r.full), key=lambda r: -len(r.records))
    dropped = [r.folder for r in full[1:]]
    notes = [f"{path.name} is left out: {full[0].folder.name} already holds the full cache." for path in dropped]
    return [r for r in runs if r.folder not in dropped], notes


def _unknown_weights(runs: Sequence[Run]) -> list[str]:
    """Runs of versions that did not record what the model's files held."""
    unknown = [r for r in runs if not (r.metrics.get("comparability") or {}).get(FINGERPRINT)]
    if not unknown or len(unknown) == len(runs):
        return []
    return [
        f"{len(unknown)} of {len(runs)} runs, {unknown[0].folder.name} first, do not say which model files they were "
        "made with (an earlier version); that all runs are of the same weights cannot be checked."
    ]


def _choose_baseline(runs: Sequence[Run], wanted: str | None) -> str | None:
    labels = list(dict.fromkeys(r.label for r in runs if not r.full))
    if wanted is None:
        return "snapkv" if "snapkv" in labels else None
    named = list(dict.fromkeys(r.label for r in runs if wanted in (r.policy, r.shown) and not r.full))
    if wanted in labels:
        return wanted
    if len(named) == 1:
        return named[0]
    raise InputError(f"--baseline {wanted}: not a policy of these runs; choose one of {', '.join(labels) or '(none)'}")


def _sample_warnings(runs: Sequence[Run], keys: Sequence[Key], scores: Array, task_of: NDArray[np.int_]) -> list[str]:
    warnings = []
    if len({key[:2] for key in keys}) < len(keys):
        count = len(keys) - len({key[:2] for key in keys})
        warnings.append(f"{count} samples have another prompt in some runs (changed data?); those are not paired.")
    common = int((~np.isnan(scores)).all(axis=1).sum())
    if len(runs) > 1 and common < len(keys):
        warnings.append(
            f"Runs cover different samples: {common} of {len(keys)} are scored in every run. Averages "
            "marked † rest on other samples than most; differences use only the samples that both sides have."
        )
    if (runs[0].metrics.get("comparability") or {}).get("random_weights"):
        warnings.append("The weights are random: scores mean nothing, only memory and retention do.")
    warnings += [w for run in runs if (w := _retention_warning(run))]
    for run in runs:
        if cut := sum(record.thought == "unfinished" for record in run.records.values()):
            warnings.append(
                f"{run.folder.name}: {cut} of {len(run.records)} predictions end in the middle of a thought and score "
                "0; a larger max_new_tokens lets them finish."
            )
    return warnings


def retention_samples(run: Run) -> tuple[int, int]:
    """Of how many samples the run's retention figures are, and how many it has a score of."""
    found = run.metrics.get("retention")
    n = found.get("samples") if isinstance(found, dict) else None
    return n if isinstance(n, int) else 0, sum(not record.error for record in run.records.values())


def _retention_warning(run: Run) -> str:
    """Where the kept positions are of other samples than the scores, or not all of one kind."""
    n, scored = retention_samples(run)
    counts = run.metrics["retention"].get("only_counts") if n else None
    if n and n != scored:
        why = f"kept positions of {n} samples, scores of {scored}"
    elif counts:
        why = f"of {n} samples {counts} have counts in bins only; heavy entries, drift and needle are of the others"
    else:
        return ""
    return f"{run.folder.name}: {why}; launch the run again with retention=positions to complete them."
