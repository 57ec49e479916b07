"""What the records add to a run's retention figures: the needle's share, the score's slope, the chosen tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from src.retention import measures as retention
from src.retention.per_head import PER_HEAD
from src.retention.profile import BINS_TO_TENTHS, rounded
from src.retention.store import KeptSample


class Record(Protocol):
    """What is asked of a record here (it is `src.records.record.Record`, a floor above)."""

    @property
    def task(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def needle(self) -> Sequence[int] | None: ...
    @property
    def cut(self) -> int: ...
    @property
    def measures(self) -> Mapping[str, Any]: ...


def needle(samples: Iterable[KeptSample], records: Iterable[Record]) -> dict[str, Any]:
    """`needle`: how much was kept of the sentence that holds the answer, where that is known (`span_retention`)."""
    spans = {(r.task, r.id): (int(r.needle[0]), int(r.needle[1])) for r in records if r.needle}
    found: dict[str, Any] = retention.span_retention(samples, spans) if spans else {"samples": 0}
    if not found["samples"]:
        return {}
    tasks = {task: rounded(share) for task, share in found.pop("per_task").items()}
    return {"needle": {**{name: rounded(value) for name, value in found.items()}, "per_task": tasks}}


def score_bias(records: Iterable[Record]) -> dict[str, Any]:
    """`score_slope`: of ln(score) against ln(position) when the prompt was cut, and what theory says for H2O's sums.

    0: the score has no positional preference. Mean over samples, layers and KV heads.
    """
    measured = [r for r in records if r.measures.get("score_slope")]
    if not measured:
        return {}
    slopes = np.array([r.measures["score_slope"] for r in measured], dtype=float)  # (samples, layers, kv_heads)
    theory = [found[0] for r in measured if (found := r.measures.get("score_slope_theory"))]
    by_task: dict[str, list[Any]] = defaultdict(list)
    for record, slope in zip(measured, slopes, strict=True):
        by_task[record.task].append(slope)
    layers, heads = slopes.shape[1:]
    found = {
        "samples": len(measured),
        "mean": _mean(slopes),
        "theory": _mean(theory),
        "per_layer": [_mean(slopes[:, layer]) for layer in range(layers)],
        "per_head": [[_mean(slopes[:, layer, head]) for head in range(heads)] for layer in range(layers)],
        "per_task": {task: _mean(np.array(each)) for task, each in sorted(by_task.items())},
    }
    return {"score_slope": found}


def chosen(records: Iterable[Record]) -> dict[str, Any]:
    """`chosen`: where the prompt tokens lie that a policy attended to, of those that keep all and choose at each step.

    Every sample weighs the same. The same measures as of kept positions, on 64 bins.
    """
    measured = [r for r in records if any(r.measures.get("chosen_positions") or ())]
    if not measured:
        return {}
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in measured:
        by_task[record.task].append(record)
    layers = np.array([r.measures["chosen_by_layer"] for r in measured], dtype=float)
    found = {
        "samples": len(measured),
        "share": _mean([r.measures["chosen_share"] for r in measured]),
        **_where(measured),
    }
    found["tokens_per_layer"] = [_mean(layers[:, layer]) for layer in range(layers.shape[1])]
    found["per_task"] = {task: _where(each) for task, each in sorted(by_task.items())}
    return {"chosen": found}


def _where(records: Sequence[Record]) -> dict[str, Any]:
    """Measures of the mean shares in 64 bins, positions spread evenly within their bin."""
    mean = retention.shares([r.measures["chosen_positions"] for r in records]).mean(axis=0)
    lengths = [r.cut for r in records]
    positions = np.sum([retention.capacity(n) / n for n in lengths], axis=0)  # what an even choice would be
    return {
        "histogram": rounded(mean),
        "decile_shares": rounded(mean @ BINS_TO_TENTHS),
        **{name: rounded(measure.of_shares(mean)) for name, measure in PER_HEAD.items()},
        "kl_uniform": rounded(retention.kl_to_uniform(mean, positions)),
        "gini": rounded(retention.gini(mean, positions)),
    }


def _mean(values: Any) -> float | None:
    found = retention.nan_mean(values)
    return None if found is None else rounded(found)
