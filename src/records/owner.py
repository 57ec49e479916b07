"""Whose folder this is: settings.json says with which settings it is filled, environment.json where that ran."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.files import write_whole
from src.records.files import METRICS, PREDICTIONS, SETTINGS, canonical, differences, settings_hash
from src.records.metrics_file import earlier_metrics
from src.records.seal import as_json, open_sealed, read_small, sealed, why_unreadable

log = logging.getLogger(__name__)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write settings.json into a new folder; of one that is filled already, it must say the same.

    Where it is damaged or gone, and metrics.json knows the settings by their hash, it is written anew.

    Raises:
        InputError: the folder is of other settings, or whose it is cannot be told.
    """
    path, ours = folder / SETTINGS, canonical(settings)
    there, damaged = path.exists(), ""
    theirs: dict[str, Any] = {}
    if there:
        try:
            theirs = read_small(path)
        except (OSError, ValueError) as error:
            damaged = why_unreadable(error)
        if not damaged and canonical(theirs) == ours:
            return
    if (folder / PREDICTIONS).exists() or there:
        if earlier_metrics(folder / METRICS).get("settings_hash") == settings_hash(settings):
            log.warning("%s: damaged; written anew, as %s says whose the folder is", path, METRICS)
        elif not there:
            raise InputError(f"{folder}: holds predictions but no {SETTINGS}, so whose they are is unknown")
        elif damaged:
            raise InputError(f"{path}: damaged ({damaged}); run with overwrite=true to start this folder afresh")
        else:
            names = ", ".join(differences(theirs, json.loads(ours)))
            raise InputError(f"{folder}: its results were made with other settings ({names}); move it away")
    write_whole(path, as_json(json.loads(ours), indent=2) + "\n")


def write_environment(folder: Path, now: Mapping[str, Any]) -> None:
    """The present environment; different earlier ones of the same folder are kept below it. Raises InputError."""
    path = folder / "environment.json"
    earlier: list[Any] = []
    if path.exists():
        try:
            before = open_sealed(read_small(path))[0]
            earlier = list(before.pop("earlier", []))
            if before != json.loads(json.dumps(now)):
                earlier.append(before)
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s: damaged (%s); written anew", path, why_unreadable(error))
    content = {**now, **({"earlier": earlier} if earlier else {})}
    write_whole(path, json.dumps(sealed(content), indent=2) + "\n")
