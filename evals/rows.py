"""Rows of task data in LongBench's shape, through `datasets`, with errors that name file and line.

`datasets.load_dataset("json", ...)` is not used to parse: it turns a column of strings such as "2015-03-04"
into datetime objects, and reports a broken row without its line. Lines are parsed here and become a
`Dataset` with explicit types.
"""

from __future__ import annotations

import json
import re
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from evals.errors import DataError
from evals.tasks import Sample, Task

if TYPE_CHECKING:
    from datasets import Dataset

LARGEST_LENGTH = 2**63 - 1  # what the column holds

Made = TypeVar("Made")


@dataclass(frozen=True)
class Broken:
    """A malformed row. `id` is its own where that can be read, else the row's number, counted from 0."""

    id: str
    error: str


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of a JSON-lines file. Blank lines are skipped."""
    for number, raw in raw_lines(path):
        yield number, parse(f"{path}, line {number}", raw)


def read_rows(
    path: Path, make: Callable[[str, int, dict[str, Any]], Made], broken: str, id_field: str = "_id"
) -> Iterator[Made | Broken]:
    """`make(place, index, row)` of every row; with broken="record" a malformed one is a `Broken`, no error."""
    for index, (number, raw) in enumerate(raw_lines(path)):
        place = f"{path}, line {number}"
        try:
            yield make(place, index, parse(place, raw))
        except DataError as error:
            if broken == "refuse":
                raise
            found = re.search(rb'"%s"\s*:\s*(?:"([^"\\]+)"|(\d+))' % id_field.encode(), raw)
            own = (found[1] or found[2]).decode("utf-8", "replace") if found else str(index)
            yield Broken(own, str(error))


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def parse(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # an escaped half of a surrogate pair is JSON but not text
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise DataError(f"{place}: not UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place}: broken JSON ({error})") from None
    except ValueError:  # JSON, but Python reads no number of that length
        raise DataError(f"{place}: holds a number of more than {sys.get_int_max_str_digits()} digits") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row


def texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def check_field(place: str, row: Mapping[str, Any], name: str, good: Callable[[Any], bool], kind: str) -> Any:
    """The field's value, or an error that names the place, the field and what it should hold."""
    if name not in row:
        raise DataError(f"{place}: field '{name}' is missing (needs {kind}; it has {', '.join(row) or 'none'})")
    if not good(row[name]):
        raise DataError(f"{place}: field '{name}' must be {kind}, found {type(row[name]).__name__}")
    return row[name]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def some_texts(value: Any) -> bool:
    return texts(value) and len(value) > 0


def longbench_row(place: str, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """One checked row in the shape of `as_dataset`. Fields that only describe the row may be absent."""
    classes, length = row.get("all_classes"), row.get("length")
    if classes is not None and not texts(classes):
        raise DataError(f"{place}: field 'all_classes' must be a list of strings or null")
    if length is not None and (type(length) is not int or abs(length) > LARGEST_LENGTH):
        raise DataError(f"{place}: field 'length' must be a whole number, at most {LARGEST_LENGTH}, or null")
    name = row.get("_id")
    if name is not None and type(name) not in (str, int):
        raise DataError(f"{place}: field '_id' must be a string, a whole number or null, found {type(name).__name__}")
    return {
        "_id": str(index) if name in (None, "") else str(name),
        "input": check_field(place, row, "input", is_text, "a string"),
        "context": check_field(place, row, "context", is_text, "a string"),
        "answers": check_field(place, row, "answers", some_texts, "a list of one or more strings"),
        "all_classes": classes,
        "length": length,
    }


def read_longbench(path: Path, broken: str = "refuse") -> Dataset:
    """A LongBench file. A row that is broken anywhere in it is an error, also beyond a limit (see `read_rows`)."""
    rows = [failed_row(row) if isinstance(row, Broken) else row for row in read_rows(path, longbench_row, broken)]
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return as_dataset(rows)


def failed_row(row: Broken) -> dict[str, Any]:
    return {"_id": row.id, "input": "", "context": "", "answers": [], "error": row.error}


def as_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows as `longbench_row` and `failed_row` give them."""
    from datasets import Dataset, Features, List, Value  # takes a second, which no other use of this file shall

    features = Features(
        {
            "_id": Value("string"),
            "input": Value("large_string"),
            "context": Value("large_string"),
            "answers": List(Value("large_string")),
            "all_classes": List(Value("string")),
            "length": Value("int64"),
            "error": Value("string"),  # why the row has no content; null for all others
        }
    )
    return Dataset.from_list([{name: row.get(name) for name in features} for row in rows], features=features)


def parse_format(prompt_format: str, question: str = "input") -> list[tuple[str, str | None]]:
    """The pieces of a prompt, each a text and the field after it: `context`, `question` (its name) or None.

    As `str.format` reads it (a doubled brace is a brace), but only plain {context} and {input} are fields: with
    {context[0]} or {context:.9} a prompt would silently hold something else than the context.

    Raises:
        ValueError: what is wrong, in one line.
    """
    pieces, wrong = [], []
    for text, field, spec, conversion in string.Formatter().parse(prompt_format):
        if field is not None and (field not in ("context", question) or spec or conversion):
            written = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            wrong.append(f"{{{written}}} is no field")
        pieces.append((text, field))
    if not any(field == "context" for _, field in pieces):
        wrong.append("has no {context}")
    if wrong:
        raise ValueError("; ".join(wrong) + "; valid: {context} and {" + question + "}, and {{ or }} for a brace")
    return pieces


def split_prompt(prompt_format: str, context: str, question: str, name: str = "input") -> tuple[str, str]:
    """The filled-in prompt, cut after the context: before + after is what `format` makes of it.

    Where the format names the question (`name`) first, it stays in `before`: whoever reads the context has read it.
    """
    pieces = parse_format(prompt_format, name)
    cut = next(i for i, (_, field) in enumerate(pieces) if field == "context") + 1
    values = {None: "", "context": context, name: question}
    filled = [text + values[field] for text, field in pieces]
    return "".join(filled[:cut]), "".join(filled[cut:])


def to_sample(task: Task, prompt_format: str, row: Mapping[str, Any], extra: dict[str, Any] | None = None) -> Sample:
    error = row["error"]
    before, after = ("", "") if error else split_prompt(prompt_format, row["context"], row["input"])
    return Sample(
        task=task,
        id=row["_id"],
        before=before,
        after=after,
        answers=tuple(row["answers"]),
        all_classes=None if row["all_classes"] is None else tuple(row["all_classes"]),
        length=row["length"],
        extra=extra or {},
        error=error,
    )
