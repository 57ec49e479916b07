"""Budgets: how many entries a layer and KV head may hold, as given, and as a prompt makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.errors import InputError


@dataclass(frozen=True)
class SplitBudget:
    """A budget in two parts: for the prompt, and for the tokens after it. Each a number as for `Variant`."""

    prompt: int | float
    decode: int | float

    def __str__(self) -> str:
        return f"{self.prompt:g}+{self.decode:g}"


Budget = int | float | SplitBudget


def check_budget(what: str, budget: Budget | None, name: str, least: int) -> None:
    if not isinstance(budget, int | float) or budget <= 0 or (isinstance(budget, float) and budget > 1):
        raise InputError(
            f"{what}={budget}: valid for {name}: entries per layer and KV head, at least {least}, "
            "or a fraction of the prompt in (0, 1]"
        )
    if isinstance(budget, int) and budget < least:
        raise InputError(f"{what}={budget}: {name} always keeps {least - 1} tokens; valid: {least} or more")


MOST = 2**31 - 1  # entries of a budget; positions are 32-bit numbers


def parse_budget(value: Any) -> Budget:
    """A budget as given: entries above 1, a share of the prompt up to 1 (1 is all of it), or {prompt: .., decode: ..}.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, Mapping):
        if set(value) != {"prompt", "decode"}:
            raise InputError(f"budget={dict(value)}: valid in two parts: {{prompt: .., decode: ..}}")
        return SplitBudget(parse_number(value["prompt"]), parse_number(value["decode"]))
    return parse_number(value)


def parse_number(value: Any) -> int | float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (value > 1 and value != int(value)):
        raise InputError(
            f"budget={value}: valid: entries per layer and KV head (2, 3, ...) or a share of the prompt in (0, 1]"
        )
    if value > MOST:
        raise InputError(f"budget={value}: valid: at most {MOST} entries; policy=full keeps everything")
    return float(value) if value <= 1 else int(value)
