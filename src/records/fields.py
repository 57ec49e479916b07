"""What the fields of a record may hold, as far as anything is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

LARGEST = 2.0**63  # no count of bytes, tokens or seconds is beyond

NAMES = ("task", "id", "prompt_hash")
TEXTS = ("error", "finish", "metric", "prediction")
NUMBERS = (
    *("prompt_tokens", "context_tokens", "new_tokens", "seconds", "prefill_seconds", "decode_seconds", "decode_steps"),
    *("lanes", "kv_bytes", "kv_bytes_peak", "kv_bytes_full", "kv_bytes_device", "kv_bytes_host", "bookkeeping_bytes"),
    *("codebook_bytes", "chosen_share", "peak_bytes", "peak_prefill_bytes", "peak_decode_bytes"),
)
GRIDS = ("needle", "score_slope", "score_slope_theory", "score_by_octave", "chosen_positions", "chosen_by_layer")


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


def is_score(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 100


def _is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _is_figures(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(is_grid, value.values()))


SORTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "score": (is_score, "a number from 0 to 100"),
    "truncated": (_is_flag, "true or false"),
    "answers": (_is_texts, "a list of texts"),
    "extra_scores": (_is_figures, "names and numbers"),
    "fidelity": (_is_figures, "names and numbers"),
    **{name: (is_text, "text") for name in TEXTS},
    **{name: (_is_amount, "a number from 0 on") for name in NUMBERS},
    **{name: (is_grid, "numbers") for name in GRIDS},
}


def fault(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a record, in half a line; None: nothing. All fields but the names may be missing or null."""
    if not is_name(record.get("task")):
        return "task should be a task's name"
    for name in NAMES:
        if not is_text(record.get(name)):
            return f"{name} should be text"
    for name, (sound, wanted) in SORTS.items():
        value = record.get(name)
        if value is not None and not sound(value):
            return f"{name} should be {wanted}"
    return None


def is_budget(value: Any) -> bool:
    return value is None or (is_number(value) and value > 0)
