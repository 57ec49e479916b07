"""The plain files of a run's folder: names, hashes, the predictions read and mended, files written whole."""

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.records.predictions import parse
from src.records.record import Record
from src.records.seal import as_json
from src.retention.store import Key

log = logging.getLogger(__name__)

PREDICTIONS, METRICS, SETTINGS = "predictions.jsonl", "metrics.json", "settings.json"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """8 hex digits of every setting that changes a sample's outcome; order and 1 against 1.0 do not count."""
    return hashlib.sha256(canonical(settings).encode(errors="surrogatepass")).hexdigest()[:8]


def run_path(
    output_root: str | Path, model: str, policy: str, budget: float | str, settings: Mapping[str, Any]
) -> Path:
    """`<output_root>/<model>/<policy>-<budget>-<8 hex>`, each part made safe as a file name."""
    shown = f"{budget:g}" if isinstance(budget, float) else str(budget)
    return Path(output_root) / _safe(model) / f"{_safe(policy)}-{_safe(shown)}-{settings_hash(settings)}"


def load_records(folder: str | Path) -> list[Record]:
    """The records that count (one per task and id, sorted). Reads only; what is torn or damaged is left out."""
    path = Path(folder) / PREDICTIONS
    if not path.exists():
        raise InputError(f"{path}: no such file; a run writes it")
    lines = parse(path)
    if lines.damaged:
        log.warning("%s; left out", lines.complaint(path))
    return current(lines.records)


def current(records: Iterable[Record]) -> list[Record]:
    """Those that count: one per task and id, sorted."""
    table = Table()
    for record in records:
        table.add(record)
    return table.current()


class Table:
    """Which records count: of each key the last that succeeded, else the last; of a task and id the last key.

    So a failed second try (for fidelity, say) never costs a good prediction.
    """

    def __init__(self) -> None:
        self.records: dict[Key, Record] = {}
        self.last: dict[tuple[str, str], Key] = {}
        self.lines: Counter[Key] = Counter()

    def add(self, record: Record) -> None:
        key = record.key
        before = self.records.get(key)
        self.lines[key] += 1
        if before is None or record.succeeded or not before.succeeded:
            self.records[key] = record
        self.last[key[:2]] = key

    def current(self) -> list[Record]:
        return [self.records[self.last[name]] for name in sorted(self.last)]

    @property
    def long(self) -> bool:
        """Has a sample run so often that the file should be shortened? One that ran again once keeps its first line."""
        return any(count > 2 for count in self.lines.values())

    def all(self) -> list[Record]:
        """One record of each key, in an order in which those that count come last."""
        current = set(self.last.values())
        return [record for _, record in sorted(self.records.items(), key=lambda item: item[0] in current)]

    def holds(self, record: Record) -> bool:
        """Is this very record one of those that count?"""
        key = record.key
        return self.last.get(key[:2]) == key and self.records[key] == record


def canonical(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return str(value) if isinstance(value, Path) else value


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name in sorted({*theirs, *ours}):
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{name}.")
        elif _plain(a) != _plain(b):
            found.append(f"{prefix}{name}: {a} there, {b} here")
    return found


def pretty(value: Any) -> str:
    """Indented JSON with every list of numbers on one line."""
    return re.sub(r"\[[-+\d.eE,\s]+\]", lambda found: " ".join(found[0].split()), as_json(value, indent=2)) + "\n"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("._") or "_"
