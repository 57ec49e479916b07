"""The plain files of a run's folder: names, hashes, the predictions read and mended, files written whole."""

import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.retention_store import Key
from src.summary import succeeded

log = logging.getLogger(__name__)

PREDICTIONS = "predictions.jsonl"


def file_name(task: str, sample: str) -> str:
    """For files of one sample: `<task>-<id>`, no two alike, also where upper and lower case are the same.

    An id that is long or holds anything but lower-case letters, digits, `_`, `.` and `-` is shortened to what is
    readable of it, followed by `~` (which no other name has) and a hash. No task's name is another's with a dash.
    """
    name = f"{task}-{sample}"
    if re.fullmatch(r"[a-z0-9_.-]{1,120}", name):
        return name
    digest = hashlib.sha256(json.dumps([task, sample]).encode()).hexdigest()[:24]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}~{digest}"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """8 hex digits of every setting that changes a sample's outcome; order and 1 against 1.0 do not count."""
    return hashlib.sha256(canonical(settings).encode()).hexdigest()[:8]


def run_path(
    output_root: str | Path, model: str, policy: str, budget: float | str, settings: Mapping[str, Any]
) -> Path:
    """`<output_root>/<model>/<policy>-<budget>-<8 hex>`, each part made safe as a file name."""
    shown = f"{budget:g}" if isinstance(budget, float) else str(budget)
    return Path(output_root) / _safe(model) / f"{_safe(policy)}-{_safe(shown)}-{settings_hash(settings)}"


def load_records(folder: str | Path) -> list[dict[str, Any]]:
    """The records that count (one per task and id, sorted). Reads only; a torn last line is left out."""
    path = Path(folder) / PREDICTIONS
    if not path.exists():
        raise InputError(f"{path}: no such file; a run writes it")
    table = Table()
    for record in parse(path)[0]:
        table.add(record)
    return table.current()


class Table:
    """Which records count: of each key the last that succeeded, else the last; of a task and id the last key.

    So a failed second try (for fidelity, say) never costs a good prediction.
    """

    def __init__(self) -> None:
        self.records: dict[Key, dict[str, Any]] = {}
        self.last: dict[tuple[str, str], Key] = {}
        self.lines: Counter[Key] = Counter()

    def add(self, record: dict[str, Any]) -> None:
        key = key_of(record)
        before = self.records.get(key)
        self.lines[key] += 1
        if before is None or succeeded(record) or not succeeded(before):
            self.records[key] = record
        self.last[key[:2]] = key

    def current(self) -> list[dict[str, Any]]:
        return [self.records[self.last[name]] for name in sorted(self.last)]

    @property
    def long(self) -> bool:
        """Has a sample run so often that the file should be shortened? One that ran again once keeps its first line."""
        return any(count > 2 for count in self.lines.values())

    def all(self) -> list[dict[str, Any]]:
        """One record of each key, in an order in which those that count come last."""
        current = set(self.last.values())
        return [record for _, record in sorted(self.records.items(), key=lambda item: item[0] in current)]

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Is this very record one of those that count?"""
        key = key_of(record)
        return self.last.get(key[:2]) == key and self.records[key] == record


def parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file and where its valid part ends. Only the last line may be torn."""
    records, place = [], 0
    with path.open("rb") as file:
        lines = file.readlines()  # bytes: only line ends split, never a separator inside a prediction
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key_of(record)
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: not a record; mend or delete this line") from None
        records.append(record)
        place += len(line)
    return records, place


def repair(path: Path) -> list[dict[str, Any]]:
    """Read the records; cut off a torn last line and close one that only lacks its line end."""
    if not path.exists():
        return []
    records, valid = parse(path)
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if valid < size:
            log.warning("%s: cut off an unfinished last line (%d bytes); that sample runs again", path, size - valid)
            file.truncate(valid)
        file.seek(max(valid - 1, 0))
        if valid and file.read(1) != b"\n":
            log.warning("%s: the last line lacked its line end; added", path)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    return records


def key_of(record: Mapping[str, Any]) -> Key:
    return str(record["task"]), str(record["id"]), str(record["prompt_hash"])


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
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[[-+\d.eE,\s]+\]", lambda found: " ".join(found[0].split()), text) + "\n"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("._") or "_"
