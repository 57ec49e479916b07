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

DIGITS = 4  # of scores (0 to 100) and of fidelity

Record = Mapping[str, Any]


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
) -> dict[str, Any]:
    """The content of metrics.json.

    `task_metrics` names each task's metric where the records do not (`metric`). `peaks` holds peak_bytes,
    peak_prefill_bytes and peak_decode_bytes as measured by the caller; where records carry fields of these
    names, the larger counts.
    """
    ordered = sorted(records, key=lambda r: (r["task"], r["id"], r["prompt_hash"]))
    good = [r for r in ordered if succeeded(r)]
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in ordered:
        by_task[record["task"]].append(record)
    tasks = {task: _task(task, rows, task_metrics or {}) for task, rows in sorted(by_task.items())}
    scores = [t["score"] for t in tasks.values() if t["score"] is not None]
    return {
        "policy": policy,
        "model": model,
        "budget": budget,
        "average": _rounded(mean(scores)),
        "samples": len(good),
        "failed": len(ordered) - len(good),
        "tasks": tasks,
        "fidelity": _fidelity_over_tasks(tasks),
        "memory": _memory(good, peaks or {}),
        "speed": _speed(good),
        "truncated_prompts": sum(bool(r.get("truncated")) for r in good),
        "stopped_by_length": sum(r.get("finish") == "length" for r in good),
        **_thoughts(good),
        "retention": dict(retention or {}),
        "comparability": dict(comparability or {}),
    }


def succeeded(record: Record) -> bool:
    """A sample that ran to its end. A failed one keeps its reason in `error` and is tried again by the next
    run.
    """
    return not record.get("error") and record.get("score") is not None


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


def _task(task: str, rows: Sequence[Record], task_metrics: Mapping[str, str]) -> dict[str, Any]:
    good = [r for r in rows if succeeded(r)]
    scores = [float(r["score"]) for r in good]
    named = next((r["metric"] for r in rows if r.get("metric")), task_metrics.get(task))
    result: dict[str, Any] = {
        "score": _rounded(mean(scores)),
        "n": len(good),
        "stderr": _rounded(standard_error(scores)),
        "metric": named,
        "failed": len(rows) - len(good),
    }
    extra = _means([r["extra_scores"] for r in good if r.get("extra_scores")])
    if extra:
        result["extra_scores"] = extra
    measured = [r["fidelity"] for r in good if r.get("fidelity")]
    if measured:
        result["fidelity"] = {**_means(measured), "n": len(measured)}
    return result


def _fidelity_over_tasks(tasks: Mapping[str, Any]) -> dict[str, Any] | None:
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


def _thoughts(rows: Sequence[Record]) -> dict[str, Any]:
    """How many predictions hold a thought, and how many of those are cut (they score 0); nothing where none does."""
    thoughts = [r for r in rows if r.get("thought", "none") != "none"]
    if not thoughts:
        return {}
    counts = {state: sum(r["thought"] == state for r in thoughts) for state in ("empty", "finished", "unfinished")}
    return {"thoughts": {**counts, "tokens_mean": _rounded(mean(r.get("thought_tokens") for r in thoughts), 2)}}


def _memory(rows: Sequence[Record], peaks: Mapping[str, float | None]) -> dict[str, Any]:
    def peak(name: str) -> int | None:
        values = [v for v in (peaks.get(name), *(r.get(name) for r in rows)) if v is not None]
        return int(max(values)) if values else None

    kept, full = (mean(r.get(name) for r in rows) for name in ("kv_bytes", "kv_bytes_full"))
    bookkeeping = mean(r.get("bookkeeping_bytes") for r in rows)
    total = None if kept is None or bookkeeping is None else kept + bookkeeping
    return {
        "kv_bytes_mean": _rounded(kept, 1),
        "kv_bytes_full_mean": _rounded(full, 1),
        "ratio": round(kept / full, 6) if kept is not None and full else None,
        **_by_device(rows, full),
        "kv_bytes_peak_mean": _rounded(mean(r.get("kv_bytes_peak") for r in rows), 1),
        "kv_bytes_peak_max": peak("kv_bytes_peak"),
        "bookkeeping_bytes_mean": _rounded(bookkeeping, 1),
        "total_bytes_mean": _rounded(total, 1),
        "total_ratio": round(total / full, 6) if total is not None and full else None,
        "peak_bytes": peak("peak_bytes"),
        "peak_prefill_bytes": peak("peak_prefill_bytes"),
        "peak_decode_bytes": peak("peak_decode_bytes"),
    }


def _by_device(rows: Sequence[Record], full: float | None) -> dict[str, Any]:
    """Where part of the cache lies in host memory: the device's part, without and with what all lanes share there."""
    device = mean(r.get("kv_bytes_device") for r in rows)
    if device is None or not full:
        return {}
    shared = max(r.get("codebook_bytes") or 0 for r in rows)
    return {
        "kv_bytes_device_mean": _rounded(device, 1),
        "kv_bytes_host_mean": _rounded(mean(r.get("kv_bytes_host") for r in rows), 1),
        "codebook_bytes": shared,
        "device_ratio": round(device / full, 6),
        "device_ratio_with_codebooks": round((device + shared) / full, 6),
        "chosen_share_mean": _rounded(mean(r.get("chosen_share") for r in rows), 6),
    }


def _speed(rows: Sequence[Record]) -> dict[str, Any]:
    """Prefill: mean seconds per sample. Decode: steps / seconds (the first new token belongs to the prefill; a
    question that is read through the cut cache takes steps too).

    A decode second shared by many lanes is no single policy's speed, hence `lanes`: how many a sample shared
    its steps with, on average.
    """
    timed = [r for r in rows if r.get("decode_seconds")]
    seconds = math.fsum(r["decode_seconds"] for r in timed)
    steps = sum(r.get("decode_steps", max(r["new_tokens"] - 1, 0)) for r in timed)
    lanes = mean(r.get("lanes") for r in rows)
    return {
        "prefill_seconds": _rounded(mean(r.get("prefill_seconds") for r in rows), 6),
        "decode_tokens_per_second": round(steps / seconds, 3) if seconds else None,
        "lanes": int(lanes) if lanes is not None and lanes == int(lanes) else _rounded(lanes, 2),
    }


def _rounded(value: float | None, digits: int = DIGITS) -> float | None:
    return None if value is None else round(value, digits)
