"""Check values: a byte that changes after a run has written its files is noticed, not believed.

Every line of predictions.jsonl, metrics.json and environment.json carry the field `check`: the CRC-32, 8 hex digits,
of the canonical JSON of all other fields. It finds every single changed bit, digit or run of up to four bytes for
certain, any other damage all but once in four thousand million times. It is no signature: who wants to lie can.

How a file from before check values is told from one that lost them: by its neighbours. A file of predictions in
which no line carries a check is from before; as soon as one line does, a line without fails. Where the file of a
running folder is from before, opening it for writing gives every line its check, so that files are never mixed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from evals.visible import reason

CHECK = "check"


def sealed(content: Mapping[str, Any], uncovered: Collection[str] = ()) -> dict[str, Any]:
    """`content` with its check value last. Fields named in `uncovered` may change without it.

    Raises:
        ValueError: a number that is not finite.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(content), allow_nan=False))  # as it will be read again
    return {**content, CHECK: check_value(plain, uncovered)}


def check_value(content: Mapping[str, Any], uncovered: Collection[str] = ()) -> str:
    """8 hex digits of all fields but `check` itself. Raises ValueError or RecursionError for what is no sound JSON."""
    covered = {name: value for name, value in content.items() if name != CHECK and name not in uncovered}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"), allow_nan=False)  # ASCII: any text has a form
    return f"{zlib.crc32(text.encode()):08x}"


def read_object(text: str | bytes) -> dict[str, Any]:
    """One JSON object, strictly: no NaN or Infinity, no number beyond a double, no nesting without end.

    Raises:
        ValueError: anything else; the message is one line.
    """
    try:
        content = json.loads(text, parse_constant=_refuse)
        json.dumps(content, allow_nan=False)  # 1e999 is read as infinity
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("should be one JSON object")
    return content


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def read_small(path: Path) -> dict[str, Any]:
    """The object that is a whole file, of no more levels than anything can walk through.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no sound JSON object.
    """
    content = read_object(path.read_bytes())
    if not _shallow(content):
        raise ValueError("nested too deeply")
    return content


def _shallow(value: Any, levels: int = 40) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(each, levels - 1) for each in inner)


def open_sealed(content: dict[str, Any], uncovered: Collection[str] = ()) -> tuple[dict[str, Any], bool]:
    """The content without its check value, and whether it had one.

    Raises:
        ValueError: it is not as it was written.
    """
    inner = {name: value for name, value in content.items() if name != CHECK}
    if CHECK in content and content[CHECK] != check_value(inner, uncovered):
        raise ValueError("changed since it was written: its check value does not fit")
    return inner, CHECK in content


def why_unreadable(error: Exception) -> str:
    """What is wrong with a file, for people: where in it a parser gave up helps nobody."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "no JSON"
    return reason(error)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: readable, or escaped where somebody's data has half of a surrogate pair.

    Raises ValueError: a number that is not finite.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, allow_nan=False)
    return text
