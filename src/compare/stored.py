"""One run's folder as a report reads it: nothing is believed that its check value, or the folder's name, denies."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from src.errors import InputError
from src.records.files import METRICS, PREDICTIONS, SETTINGS, current, settings_hash
from src.records.kinds import is_number
from src.records.metrics import compute_metrics
from src.records.metrics_file import read_metrics
from src.records.predictions import Lines, parse
from src.records.record import Record
from src.records.seal import open_sealed, read_small, why_unreadable

AGAIN = "launch the run again"
PARTS = ("policy", "model", "budget")


def stored_metrics(folder: Path) -> tuple[dict[str, Any], bool]:
    """metrics.json, and whether it carries a check value.

    Raises:
        InputError: it is damaged.
    """
    path = folder / METRICS
    try:
        return read_metrics(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {why_unreadable(error)}; {AGAIN} to write it anew") from None


def stored_settings(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """settings.json, whose hash stands in metrics.json and at the end of the folder's name; else config.yaml.

    Raises:
        InputError: it is damaged, or it says another policy, model or budget than metrics.json.
    """
    path = folder / SETTINGS
    if not path.exists():
        return _yaml(folder / "config.yaml")
    try:
        settings = read_small(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({why_unreadable(error)}); {AGAIN} to write it anew") from None
    named = re.search(r"-([0-9a-f]{8})$", folder.name)
    for where, known in ((METRICS, metrics.get("settings_hash")), ("the folder's name", named and named[1])):
        if known and known != settings_hash(settings):
            raise InputError(f"{path}: damaged: its hash is not that of {where}; {AGAIN} to write it anew")
    theirs = {name: settings.get(name) for name in PARTS}
    for name in ("policy", "model"):
        value = theirs[name]
        theirs[name] = value.get("name") if isinstance(value, Mapping) else value
    for name in PARTS:
        if name in settings and theirs[name] is not None and theirs[name] != metrics.get(name):
            raise InputError(f"{folder}: {name} is {metrics.get(name)} in {METRICS}, {theirs[name]} in {SETTINGS}")
    return settings


def stored_environment(folder: Path) -> tuple[dict[str, Any], str]:
    """environment.json, and what is to be said about it."""
    path = folder / "environment.json"
    if not path.exists():
        return {}, ""
    try:
        return open_sealed(read_small(path))[0], ""
    except (OSError, ValueError) as error:
        return {}, f"{folder.name}: environment.json is damaged ({why_unreadable(error)}) and not shown."


def stored_records(folder: Path, checked: bool) -> tuple[list[Record], Lines]:
    """The records that count, of sound lines only.

    Args:
        checked: the folder carries check values, so that every line must.

    Raises:
        InputError: no line is sound.
    """
    path = folder / PREDICTIONS
    try:
        lines = parse(path, checked)
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror})") from None
    if not lines.records and (lines.damaged or lines.torn):
        raise InputError(f"{lines.complaint(path) or f'{path}: torn'}; no line of it is sound; {AGAIN}")
    return current(lines.records), lines


def recomputed(folder: Path, records: list[Record], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of these records; of metrics.json what records do not say.

    Raises:
        InputError: the records do not fit together.
    """
    tasks = {task: figures.get("metric") for task, figures in stored["tasks"].items()}
    try:
        metrics = compute_metrics(
            records,
            **{name: stored[name] for name in PARTS if name != "budget"},
            budget=stored.get("budget"),
            comparability=stored["comparability"],
            task_metrics={task: metric for task, metric in tasks.items() if isinstance(metric, str)},
            retention=stored["retention"],
        )
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise InputError(f"{folder / PREDICTIONS}: its records do not fit together ({why_unreadable(error)})") from None
    return {**metrics, "missing": stored["missing"]}


def disagreement(stored: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Where metrics.json and the predictions differ: in how many samples there are, or in what they come to."""
    counts = [sum(figures.get(name) or 0 for name in ("samples", "failed")) for figures in (stored, found)]
    if stored.get("samples") is not None and counts[0] != counts[1]:
        return f"metrics.json counts {counts[0]:g} samples, its predictions are {counts[1]:g} (used here)"
    said = _means(stored)
    for name, value in _means(found).items():
        before = said.get(name, value)
        if abs(before - value) > 1e-6 * max(1.0, abs(value)):
            return f"metrics.json says {before:.6g} for {name}, its predictions give {value:.6g} (used here)"
    return ""


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    result: dict[str, Any] = {}
    for name, value in mapping.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        result.update(inner)
    return result


def _means(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What is a plain mean over records, in all versions of metrics.json alike."""
    memory = {name: value for name, value in metrics["memory"].items() if name.endswith("_mean")}
    parts = {"the average": metrics.get("average"), "fidelity": metrics.get("fidelity"), "memory": memory}
    parts |= {task: figures.get("score") for task, figures in metrics["tasks"].items()}
    return {name.replace(".", " "): value for name, value in flat(parts).items() if is_number(value)}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable ({why_unreadable(error)})") from None
    return content if isinstance(content, dict) else {}
