"""Why a results folder begins anew, although one of the same policy, budget and settings is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.records.files import PREDICTIONS, differences

FINGERPRINT = "model.fingerprint"


def begun_anew(path: Path, settings: Mapping[str, Any]) -> str | None:
    """One line that names the folder beside `path` that other model files or an earlier version filled.

    None: `path` has predictions already, or no folder beside it has these settings and another fingerprint.
    Settings that the other folder does not know are no difference: versions before had fewer.
    """
    if (path / PREDICTIONS).exists():
        return None
    for other in sorted(path.parent.glob(f"{path.name.rpartition('-')[0]}-????????")):
        try:
            theirs = json.loads((other / "settings.json").read_text(encoding="utf-8"))
            before = theirs["model"].get("fingerprint")
            known = _known(settings, theirs)
            found = differences(theirs, known)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # not a results folder, or a damaged one
        if not (other / PREDICTIONS).exists() or [line for line in found if not line.startswith(f"{FINGERPRINT}:")]:
            continue
        if before is None:
            return f"{path}: begins anew; of {other.name} it is not known which model files it was made with"
        if before != settings["model"]["fingerprint"]:
            return f"{path}: begins anew; {other.name} was made with other model files (weights, tokenizer or config)"
    return None


def _known(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings of the names that theirs have, too."""
    return {
        name: _known(value, theirs[name]) if isinstance(value, Mapping) and isinstance(theirs[name], Mapping) else value
        for name, value in ours.items()
        if name in theirs
    }
