"""Is a setting of its kind? Asked of a policy's settings and of every other that a command is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from src.errors import InputError

MOST = 2**63 - 1  # of whole numbers: what tensors hold


@dataclass(frozen=True)
class Rule:
    """What a type does not say about a setting: `limit: Annotated[int | None, whole(1, "every sample")]`."""

    valid: Callable[[Any], bool]
    wanted: str  # what would be valid, for people


def whole(least: int | None = None, or_null: str = "") -> Rule:
    """A whole number; `or_null` says what null means, empty: it is not valid."""

    def valid(value: Any) -> bool:
        if value is None:
            return bool(or_null)
        return type(value) is int and abs(value) <= MOST and (least is None or value >= least)

    wanted = "a whole number" if least is None else f"a whole number, {least} or more"
    return Rule(valid, wanted + null(or_null))


def one_of(choices: Sequence[Any]) -> Rule:
    return Rule(lambda value: value in choices, ", ".join(str(choice) for choice in choices))


def text(or_null: str = "") -> Rule:
    """One that is not empty."""

    def valid(value: Any) -> bool:
        return (value is None and bool(or_null)) or (isinstance(value, str) and bool(value))

    return Rule(valid, "a name or path" + null(or_null))


def texts(or_null: str = "") -> Rule:
    """A list of them."""

    def valid(value: Any) -> bool:
        listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return listed or (value is None and bool(or_null))

    return Rule(valid, "a list of names, e.g. [first,second]" + null(or_null))


def null(meaning: str) -> str:
    return f", or null: {meaning}" if meaning else ""


SECONDS = Rule(lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0, "seconds, more than 0")
PLAIN = {  # kinds that need no rule beside them
    bool: Rule(lambda value: isinstance(value, bool), "true, false"),
    int: Rule(lambda value: type(value) is int and value >= 0, "a whole number, 0 or more"),
    float: Rule(lambda value: type(value) in (int, float) and value >= 0, "a number, 0 or more"),
}


def rule_of(kind: Any) -> Rule | None:
    """What an annotation asks of a value; None: nothing."""
    if get_origin(kind) is Annotated:
        return next((rule for rule in kind.__metadata__ if isinstance(rule, Rule)), None)
    if get_origin(kind) is Literal:
        return one_of(get_args(kind))
    return PLAIN.get(kind)


def check(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError unless `value` is what its annotation asks (`rule_of`)."""
    rule = rule_of(kind)
    if rule and not rule.valid(value):
        raise ValueError(f"{name}={value}: valid: {rule.wanted}")


def rules(settings: type[Any]) -> dict[str, Rule | None]:
    """Name of every field of a dataclass -> what is asked of it."""
    hints = get_type_hints(settings, include_extras=True)
    return {setting.name: rule_of(hints[setting.name]) for setting in fields(settings)}


def check_fields(settings: Any, group: str = "") -> None:
    """Every field of a dataclass against its annotation.

    Args:
        group: what a command writes before the name, with its dot.

    Raises:
        InputError: for the first that is wrong: its name, its value, what would be valid.
    """
    for name, rule in rules(type(settings)).items():
        value = getattr(settings, name)
        if rule and not rule.valid(value):
            raise InputError(f"{group}{name}={shown(value)}: valid: {rule.wanted}")


def shown(value: Any) -> str:
    """As one would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
