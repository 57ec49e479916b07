"""Text from outside (names, ids, messages) made safe to look at. It knows no format but plain text and CSV."""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")

# What a terminal obeys or nobody sees: C0, DEL and C1 controls, line and paragraph separators, marks that turn the
# reading direction, and lone surrogates, which cannot even be written as UTF-8.
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # a spreadsheet runs a cell that begins so; the wide forms too
LONGEST = 60  # characters of a name in a picture


def visible(text: str, keep: str = "") -> str:
    r"""`text` with every control character shown (`\x1b`, `\u202e`), not sent; those in `keep` stay as they are."""
    return HIDDEN.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def one_line(text: str) -> str:
    """`visible`, with every run of white space as one blank."""
    return visible(" ".join(text.split()))


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or the name of its kind where it says nothing."""
    said = str(error).strip()
    return visible(said.splitlines()[0][:200]) if said else type(error).__name__


def shortened(text: str, longest: int = LONGEST) -> str:
    """`visible` text of at most so many characters: the middle of a longer one is left out."""
    text = visible(text)
    head = longest * 2 // 3
    return text if len(text) <= longest else f"{text[:head]}…{text[head + 1 - longest :]}"


def csv_cell(value: T) -> T | str:
    """A value for a CSV file that people open in a spreadsheet: text never begins a formula, numbers stay numbers."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    # Where a control character stood in front, what follows it must not be the beginning either.
    begins = text.lstrip().startswith(FORMULA) or HIDDEN.match(value)
    return f"'{text}" if begins else text


def _escape(letter: str) -> str:
    return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(letter) or (
        f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\u{ord(letter):04x}"
    )
