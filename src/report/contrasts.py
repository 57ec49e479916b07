"""Two looks below the averages: the samples on which policies differ most, and maps of what was kept."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from src.compare.matched import Study
from src.compare.runs import Run
from src.errors import InputError
from src.retention.measures import capacity
from src.retention.store import Key, load_retention

CUT = 1500  # characters of a prediction that are shown
MAP_SAMPLES = 96  # per run; the mean over them is stable long before


@dataclass(frozen=True)
class Answer:
    """One prediction and the runs that gave it."""

    text: str
    score: float | None
    runs: tuple[Run, ...]
    error: str | None = None


@dataclass(frozen=True)
class Contrast:
    """A sample, what was expected, and what the runs said."""

    key: Key
    expected: tuple[str, ...]
    prompt_tokens: int | None
    low: float
    high: float
    answers: tuple[Answer, ...]  # best score first


def contrasts(study: Study, limit: int = 24) -> list[Contrast]:
    """The samples with the widest spread of scores, then the largest variance; tasks take turns."""
    scored = (~np.isnan(study.scores)).sum(axis=1) >= 2
    if not scored.any():
        return []
    rows = np.flatnonzero(scored)
    spread = np.nanmax(study.scores[rows], axis=1) - np.nanmin(study.scores[rows], axis=1)
    variance = np.nanvar(study.scores[rows], axis=1)
    order = [int(i) for i in np.lexsort((-variance, -spread)) if spread[i] > 0]
    turns: dict[int, int] = {}
    ranked = []
    for i in order:
        task = int(study.task_of[rows[i]])
        turns[task] = turns.get(task, 0) + 1
        ranked.append((turns[task], i))
    chosen = [i for _, i in sorted(ranked, key=lambda pair: pair[0])[:limit]]  # stable: best of each task first
    return [_contrast(study, int(rows[i])) for i in sorted(chosen, key=order.index)]


def _contrast(study: Study, row: int) -> Contrast:
    key = study.keys[row]
    groups: dict[tuple[str, float | None, str | None], list[Run]] = {}
    for run in study.runs:
        record = run.records.get(key)
        if record is not None:
            error = record.error or None
            said = "" if error else record.scored
            groups.setdefault((said, record.score, error), []).append(run)
    answers = [Answer(text, score, tuple(runs), error) for (text, score, error), runs in groups.items()]
    answers.sort(key=lambda a: (a.error is not None, -(a.score if a.score is not None else -1.0)))
    first = next(run.records[key] for run in study.runs if key in run.records)
    low, high = float(np.nanmin(study.scores[row])), float(np.nanmax(study.scores[row]))
    expected = tuple(first.answers or ())
    return Contrast(key, expected, first.prompt_tokens, low, high, tuple(answers))


@dataclass(frozen=True)
class KeptMap:
    """Of each part of the prompt, the share of its positions that a head kept: `(layers, 64)`, over n samples."""

    shares: NDArray[np.float64]
    n: int


def retention_maps(study: Study) -> tuple[dict[int, KeptMap], list[str]]:
    """What every run kept after the prompt, and warnings.

    The same samples for every run where it has them, spread evenly over the sorted samples.
    """
    picks = np.linspace(0, len(study.keys) - 1, min(MAP_SAMPLES, len(study.keys))).round().astype(int)
    wanted = [study.keys[i] for i in dict.fromkeys(picks.tolist())]
    maps: dict[int, KeptMap] = {}
    warnings: list[str] = []
    for column, run in enumerate(study.runs):
        if run.full or run.budget is None or not (run.folder / "retention.npz").exists():
            continue
        try:
            retention = load_retention(run.folder)
            found = [
                sample.counts() / np.maximum(capacity(sample.n), 1)
                for sample in (retention.sample(key) for key in wanted if key in retention)
            ]
            retention.close()
        except InputError as error:
            warnings.append(f"No retention map of {run.cell}: {error}")
            continue
        if found:
            maps[column] = KeptMap(np.mean(found, axis=(0, 2)), len(found))
    return maps, warnings
