"""Which policies are reconstructions: their figures are shown with that word beside the name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).resolve().parents[2] / "conf" / "policy"
MARK = "(our reconstruction)"


def reconstruction(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Where a reconstructed policy's formulas come from; "" for any other.

    As the run recorded it. Runs of before did not: there the project's own policies are asked. What a results folder
    names is never imported, for the folder may be somebody else's.
    """
    recorded = metrics.get("reconstruction")
    if isinstance(recorded, str):
        return recorded
    policy = settings.get("policy")
    target = policy.get("_target_") if isinstance(policy, Mapping) else None
    for own, text in own_reconstructions():
        if target == own[1] or (target is None and metrics.get("policy") == own[0]):
            return text
    return ""


@cache
def own_reconstructions() -> tuple[tuple[tuple[str, str], str], ...]:
    """((name, target), where its formulas come from) of the policies in conf/policy/ that are reconstructions."""
    found = []
    for path in sorted(CONF.glob("*.yaml")):
        target = str(yaml.safe_load(path.read_text(encoding="utf-8"))["_target_"])
        module, _, name = target.rpartition(".")
        text = str(getattr(import_module(module), name).reconstruction)
        if text:
            found.append(((path.stem, target), text))
    return tuple(found)
