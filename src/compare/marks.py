"""Which policies are reconstructions: their figures are shown with that word beside the name."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf" / "policy"
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
        text = declared(ROOT / Path(*module.split(".")).with_suffix(".py"), name)
        if text:
            found.append(((path.stem, target), text))
    return tuple(found)


def declared(path: Path, name: str) -> str:
    """A class's `reconstruction` as its file says it; read, not imported: a report needs no model library."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "reconstruction" and line.value:
                    return str(ast.literal_eval(line.value))
    return ""
