"""What a stored value may be, and how a schema says what a field is about.

`Record` (src/records/record.py) and `Metrics` (src/records/metrics_schema.py) annotate their fields with `About`; what
checks a line, what computes from it and docs/results.md all read it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

LARGEST = 2.0**63  # no count of bytes, tokens or seconds is beyond


def is_number(value: Any) -> bool:
    """A finite number of ordinary size; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def is_grid(value: Any) -> bool:
    """Numbers, possibly missing, in lists within lists."""
    return value is None or is_number(value) or (isinstance(value, list) and all(map(is_grid, value)))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_name(value: Any) -> bool:
    """Text that can stand in a table: short, and every character whole."""
    return isinstance(value, str) and 0 < len(value) <= 200 and not any("\ud800" <= c <= "\udfff" for c in value)


def is_budget(value: Any) -> bool:
    return value is None or (is_number(value) and value > 0)


def _is_figures(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(is_grid, value.values()))


@dataclass(frozen=True)
class Kind:
    """What the values of a field may be. `wanted` completes "score should be ..."."""

    wanted: str
    sound: Callable[[Any], bool]


ANY = Kind("anything", lambda value: True)
NAME = Kind("a task's name", is_name)
TEXT = Kind("text", is_text)
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(map(is_text, value)))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SCORE = Kind("a number from 0 to 100", lambda value: is_number(value) and 0 <= value <= 100)
AMOUNT = Kind("a number from 0 on", lambda value: is_number(value) and value >= 0)
GRID = Kind("numbers", is_grid)
FIGURES = Kind("names and numbers", _is_figures)


@dataclass(frozen=True)
class About:
    """What a field means.

    Attributes:
        what: it says, in a line.
        unit: of its numbers; empty where there is none to name.
        kind: what its values may be, as far as anything is computed from them.
        null: written as null where there is no value; other fields are left out.
    """

    what: str
    unit: str = ""
    kind: Kind = ANY
    null: bool = False


def schema(described: type) -> dict[str, About]:
    """Field -> what it is about, in the order declared: of a class whose fields are `Annotated[..., About(...)]`."""
    hints = get_type_hints(described, include_extras=True)
    return {
        name: about
        for name, hint in hints.items()
        for about in getattr(hint, "__metadata__", ())
        if isinstance(about, About)
    }
