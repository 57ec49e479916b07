"""metrics.json with its check value.

The check leaves out `speed` and `memory`: so equal runs have equal checks, however long they took. The report
computes both from the predictions; only the processes' peaks are nowhere else, and no table shows them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.files import write_whole
from src.records.files import pretty
from src.records.kinds import is_budget, is_grid, is_name, is_number
from src.records.seal import open_sealed, read_small, sealed, why_unreadable
from src.retention.per_head import PER_HEAD

log = logging.getLogger(__name__)

UNCOVERED = ("speed", "memory")
MEASURES = (*PER_HEAD, "kl_uniform", "gini", "drift")


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Write and return them with the check value. Raises InputError: it cannot be written."""
    content = sealed(metrics, UNCOVERED)
    write_whole(path, pretty(content))
    return content


def read_metrics(path: Path) -> tuple[dict[str, Any], bool]:
    """What `write_metrics` wrote, without the check value, and whether there was one (there is none in old folders).

    Raises:
        OSError: it cannot be read.
        ValueError: damaged, or its values are of no use; the message is one line.
    """
    metrics, has_check = open_sealed(read_small(path), UNCOVERED)
    for name in ("policy", "model"):
        if not is_name(metrics.get(name)):
            raise ValueError(f"lacks {name}, or it is no name" if metrics.get(name) else f"lacks {name}")
    if not is_budget(metrics.get("budget")):
        raise ValueError("budget should be a number above 0, or null")
    for name in ("comparability", "memory", "retention", "tasks"):
        if not isinstance(metrics.setdefault(name, {}), dict):
            raise ValueError(f"{name} should be an object")
    if not all(isinstance(figures, dict) for figures in metrics["tasks"].values()):
        raise ValueError("tasks should be objects")
    missing = metrics.get("missing") or []
    if not isinstance(missing, list) or not all(_is_sample(each) for each in missing):
        raise ValueError("missing should be a list of tasks and ids")
    metrics["missing"] = missing
    for name in ("average", "samples", "failed"):
        if metrics.get(name) is not None and not is_number(metrics[name]):
            raise ValueError(f"{name} should be a number")
    if why := _retention_fault(metrics["retention"]):
        raise ValueError(f"retention: {why}")
    return metrics, has_check


def earlier_metrics(path: Path) -> dict[str, Any]:
    """metrics.json as an earlier call left it; empty if there is none, or if it is damaged."""
    if not path.exists():
        return {}
    try:
        return read_metrics(path)[0]
    except (OSError, ValueError) as error:
        log.warning(
            "%s: damaged (%s); written anew, without earlier calls' peaks and missing samples",
            path,
            why_unreadable(error),
        )
        return {}


def _is_sample(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _retention_fault(found: dict[str, Any]) -> str:
    """What is wrong with the figures that tables show; nothing, if nothing is."""
    for name in ("heavy", "chosen", "needle", "score_slope"):
        if not isinstance(found.get(name) or {}, dict):
            return f"{name} should be an object"
    for name, part in (("", found), *((name, found.get(name) or {}) for name in ("heavy", "chosen"))):
        shares = part.get("decile_shares")
        if shares is not None and not (isinstance(shares, list) and len(shares) == 10 and is_grid(shares)):
            return f"{name} decile_shares should be ten numbers".strip()
        for measure in MEASURES:
            if part.get(measure) is not None and not is_number(part[measure]):
                return f"{name} {measure} should be a number".strip()
    for name, fields in (("needle", ("after_prompt",)), ("score_slope", ("mean", "theory"))):
        part = found.get(name) or {}
        if any(part.get(field) is not None and not is_number(part[field]) for field in fields):
            return f"{name} should be numbers"
        if part and not set(fields) <= set(part):
            return f"{name} lacks {' or '.join(fields)}"
    if found and not (isinstance(found.get("samples"), int) and isinstance(found.get("only_counts") or 0, int)):
        return "samples should be a number"
    return ""
