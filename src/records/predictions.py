"""predictions.jsonl: its lines with their check values, read whole or in part, and made sound again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from src.files import write_whole
from src.records.record import Record, read_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lines:
    """What a file of predictions holds.

    Attributes:
        records: of the sound lines, in the order written.
        raw: the sound lines as they stand in the file, each with its line end.
        damaged: number (from 1) of every other line, and what is wrong with it.
        torn: bytes of a last line that was not written to its end.
        unclosed: the last line is sound but lacks its line end.
        before: no line carries a check value: the file is from before there were any.
    """

    records: tuple[Record, ...]
    raw: tuple[bytes, ...]
    damaged: tuple[tuple[int, str], ...]
    torn: int
    unclosed: bool
    before: bool

    def complaint(self, path: Path | str) -> str:
        """`<path>:<lines>: damaged (why)`, or nothing. A torn last line is what a killed run leaves, no damage."""
        if not self.damaged:
            return ""
        numbers = ", ".join(str(number) for number, _ in self.damaged[:10]) + (", ..." if self.damaged[10:] else "")
        return f"{path}:{numbers}: damaged ({self.damaged[0][1]})"


def parse(path: Path, checked: bool = False) -> Lines:
    """Read the file; never fails over what a line holds.

    Args:
        checked: the folder is known to carry check values, so that no line may lack one.
    """
    with path.open("rb") as file:
        lines = file.readlines()  # bytes: only line ends split, never a separator inside a prediction
    read = [read_line(line) for line in lines]
    checked = checked or any(has_check for _, has_check, _ in read)
    records, raw, damaged, torn = [], [], [], 0
    for number, (line, (record, has_check, why)) in enumerate(zip(lines, read, strict=True), 1):
        if record is not None and (has_check or not checked):
            records.append(record)
            raw.append(line if line.endswith(b"\n") else line + b"\n")
        elif number == len(lines) and not line.endswith(b"\n"):
            torn = len(line)
        else:
            damaged.append((number, why or "its check value is gone"))
    unclosed = bool(raw) and not torn and not lines[-1].endswith(b"\n")
    return Lines(tuple(records), tuple(raw), tuple(damaged), torn, unclosed, bool(records) and not checked)


def repair(path: Path) -> list[Record]:
    """Read the records. A line that is torn or damaged is dropped, so that its sample runs again; lines from before
    check values get theirs.

    Raises:
        InputError: the mended file cannot be written.
    """
    if not path.exists():
        return []
    lines = parse(path)
    if lines.torn:
        log.warning("%s: cut off an unfinished last line (%d bytes); that sample runs again", path, lines.torn)
    if lines.damaged:
        log.warning("%s; dropped, the samples run again", lines.complaint(path))
    if lines.unclosed:
        log.warning("%s: the last line lacked its line end; added", path)
    if lines.before:
        log.warning("%s: from before lines carried check values; taken as it is, and given them now", path)
        write_whole(path, b"".join(record.line() for record in lines.records))
    elif lines.torn or lines.damaged or lines.unclosed:
        write_whole(path, b"".join(lines.raw))
    return list(lines.records)
