"""Reads a .wandb file back (wandb 0.31 ships no Python reader): LevelDB's log format holding protobuf
records.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, message = 7, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            place += left
            continue
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def finished(path: Path) -> bool:
    return any(record.WhichOneof("record_type") == "exit" for record in records(path))


def values(path: Path) -> dict[str, dict[str, str]]:
    """The last JSON value of every name in the config, history and summary."""
    found: dict[str, dict[str, str]] = {"config": {}, "history": {}, "summary": {}}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            items = record.run.config.update
        elif kind == "config":
            items = record.config.update
        elif kind in ("history", "summary"):
            items = record.history.item if kind == "history" else record.summary.update
        else:
            continue
        for item in items:
            found["config" if kind == "run" else kind]["/".join(item.nested_key) or item.key] = item.value_json
    return found
