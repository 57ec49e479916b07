"""metrics.json: what a run's records add up to. Pure functions; the order of the records never matters.

Every task's score is the mean over its samples that have one; a failed sample counts in `failed` and in no
mean. `average` is the plain mean over tasks (macro), as in the papers. Standard errors are sd / sqrt(n), sd
with n - 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from src.records.metrics_schema import Memory, Metrics, Speed, TaskFigures, Thoughts
from src.records.record import Record

DIGITS = 4  # of scores (0 to 100) and of fidelity


def compute_metrics(
    records: Iterable[Record],
    *,
    policy: str,
    model: str,
    budget: float | int | None,
    comparability: Mapping[str, Any] | None = None,
    task_metrics: Mapping[str, str] | None = None,
    peaks: Mapping[str, float | None] | None = None,
    retention: Mapping[str, Any] | None = None,
) -> Metrics:
    """The content of metrics.json, as far as records and names say it.

    `task_metrics` names each task's metric where the records do not (`metric`). `peaks` holds peak_bytes,
    peak_prefill_bytes and peak_decode_bytes as measured by the caller; where records carry fields of these
    names, the larger counts.
    """
    ordered = sorted(records, key=lambda r: r.key)
    good = [r for r in ordered if r.succeeded]
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in ordered:
        by_task[record.task].append(record)
    tasks = {task: _task(task, rows, task_metrics or {}) for task, rows in sorted(by_task.items())}
    return {
        "policy": policy,
        "model": model,
        "budget": budget,
        "average": _rounded(mean(t["score"] for t in tasks.values())),
        "samples": len(good),
        "failed": len(ordered) - len(good),
        "tasks": tasks,
        "fidelity": _fidelity_over_tasks(tasks),
        "memory": _memory(good, peaks or {}),
        "speed": _speed(good),
        "truncated_prompts": sum(bool(r.truncated) for r in good),
        "stopped_by_length": sum(r.finish == "length" for r in good),
        **_thoughts(good),
        "retention": dict(retention or {}),
        "comparability": dict(comparability or {}),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there (exactly rounded, so independent of their order); None of none."""
    present = [v for v in values if v is not None]
    return math.fsum(present) / len(present) if present else None


def standard_error(values: Sequence[float]) -> float | None:
    """sd / sqrt(n) with n - 1 in the variance; None below two values."""
    n = len(values)
    if n < 2:
        return None
    centre = math.fsum(values) / n
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1) / n)


def _task(task: str, rows: Sequence[Record], task_metrics: Mapping[str, str]) -> TaskFigures:
    good = [r for r in rows if r.succeeded]
    scores = [float(r.score) for r in good if r.score is not None]
    result: TaskFigures = {
        "score": _rounded(mean(scores)),
        "n": len(good),
        "stderr": _rounded(standard_error(scores)),
        "metric": next((r.metric for r in rows if r.metric), task_metrics.get(task)),
        "failed": len(rows) - len(good),
    }
    extra = _means([r.extra_scores for r in good if r.extra_scores])
    if extra:
        result["extra_scores"] = extra
    measured = [r.fidelity for r in good if r.fidelity]
    if measured:
        result["fidelity"] = {**_means(measured), "n": len(measured)}
    return result


def _fidelity_over_tasks(tasks: Mapping[str, TaskFigures]) -> dict[str, Any] | None:
    """Mean over tasks of the tasks' means, like `average`; n counts samples."""
    measured = [t["fidelity"] for t in tasks.values() if "fidelity" in t]
    if not measured:
        return None
    means = _means([{k: v for k, v in m.items() if k != "n"} for m in measured])
    return {**means, "n": sum(m["n"] for m in measured)}


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of every numeric field, and of lists (errors by layer) entry by entry."""
    found: dict[str, Any] = {}
    for name in sorted({name for row in rows for name in row}):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and all(isinstance(value, list) for value in values):
            found[name] = [_rounded(mean(entries), 6) for entries in zip(*values, strict=True)]
        elif any(isinstance(value, int | float) for value in values):
            found[name] = _rounded(mean(value for value in values if isinstance(value, int | float)), 6)
    return found


def _thoughts(rows: Sequence[Record]) -> Metrics:
    """How many predictions hold a thought, and how many of those are cut (they score 0); nothing where none does."""
    thoughts = [r for r in rows if r.thought not in (None, "none")]
    if not thoughts:
        return {}
    found: Thoughts = {
        "empty": sum(r.thought == "empty" for r in thoughts),
        "finished": sum(r.thought == "finished" for r in thoughts),
        "unfinished": sum(r.thought == "unfinished" for r in thoughts),
        "tokens_mean": _rounded(mean(r.thought_tokens for r in thoughts), 2),
    }
    return {"thoughts": found}


def _memory(rows: Sequence[Record], peaks: Mapping[str, float | None]) -> Memory:
    def largest(*values: float | None) -> int | None:
        present = [v for v in values if v is not None]
        return int(max(present)) if present else None

    kept, full = mean(r.kv_bytes for r in rows), mean(r.kv_bytes_full for r in rows)
    bookkeeping = mean(r.bookkeeping_bytes for r in rows)
    total = None if kept is None or bookkeeping is None else kept + bookkeeping
    return {
        "kv_bytes_mean": _rounded(kept, 1),
        "kv_bytes_full_mean": _rounded(full, 1),
        "ratio": round(kept / full, 6) if kept is not None and full else None,
        **_by_device(rows, full),
        "kv_bytes_peak_mean": _rounded(mean(r.kv_bytes_peak for r in rows), 1),
        "kv_bytes_peak_max": largest(*(r.kv_bytes_peak for r in rows)),
        "bookkeeping_bytes_mean": _rounded(bookkeeping, 1),
        "total_bytes_mean": _rounded(total, 1),
        "total_ratio": round(total / full, 6) if total is not None and full else None,
        "peak_bytes": largest(peaks.get("peak_bytes"), *(r.peak_bytes for r in rows)),
        "peak_prefill_bytes": largest(peaks.get("peak_prefill_bytes"), *(r.peak_prefill_bytes for r in rows)),
        "peak_decode_bytes": largest(peaks.get("peak_decode_bytes"), *(r.peak_decode_bytes for r in rows)),
    }


def _by_device(rows: Sequence[Record], full: float | None) -> Memory:
    """Where part of the cache lies in host memory: the device's part, without and with what all lanes share there."""
    device = mean(r.kv_bytes_device for r in rows)
    if device is None or not full:
        return {}
    shared = max(r.measures.get("codebook_bytes") or 0 for r in rows)
    return {
        "kv_bytes_device_mean": _rounded(device, 1),
        "kv_bytes_host_mean": _rounded(mean(r.kv_bytes_host for r in rows), 1),
        "codebook_bytes": shared,
        "device_ratio": round(device / full, 6),
        "device_ratio_with_codebooks": round((device + shared) / full, 6),
        "chosen_share_mean": _rounded(mean(r.measures.get("chosen_share") for r in rows), 6),
    }


def _speed(rows: Sequence[Record]) -> Speed:
    """Prefill: mean seconds per sample. Decode: steps / seconds (the first new token belongs to the prefill; a
    question that is read through the cut cache takes steps too).

    A decode second shared by many lanes is no single policy's speed, hence `lanes`: how many a sample shared
    its steps with, on average.
    """
    timed = [r for r in rows if r.decode_seconds]
    seconds = math.fsum(r.decode_seconds or 0 for r in timed)
    steps = sum(r.steps for r in timed)
    lanes = mean(r.lanes for r in rows)
    return {
        "prefill_seconds": _rounded(mean(r.prefill_seconds for r in rows), 6),
        "decode_tokens_per_second": round(steps / seconds, 3) if seconds else None,
        "lanes": int(lanes) if lanes is not None and lanes == int(lanes) else _rounded(lanes, 2),
    }


def _rounded(value: float | None, digits: int = DIGITS) -> float | None:
    return None if value is None else round(value, digits)
