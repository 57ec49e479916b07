"""python -m src.records --write docs/results.md: the tables of fields there, made anew from the schemas."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from src.errors import InputError
from src.files import write_whole
from src.records.kinds import ANY, About, schema
from src.records.metrics_schema import Memory, Metrics, Speed, TaskFigures, Thoughts, retention_fields
from src.records.record import FIELDS, MEASURES

TABLES: dict[str, dict[str, About]] = {
    "record": FIELDS,
    "measures": MEASURES,
    "metrics": schema(Metrics),
    "tasks": schema(TaskFigures),
    "memory": schema(Memory),
    "speed": schema(Speed),
    "thoughts": schema(Thoughts),
    "retention": retention_fields(),
}


def table(fields: dict[str, About]) -> str:
    """Markdown: a line per field, with what its values may be where that is checked."""
    checked = any(about.kind is not ANY for about in fields.values())
    heads = ["field", "what it means", "unit", *(["value"] if checked else [])]
    rows = [
        [f"`{name}`", about.what, about.unit, *([_value(about)] if checked else [])] for name, about in fields.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def _value(about: About) -> str:
    return f"{about.kind.wanted}, or null" if about.null else about.kind.wanted


def filled(text: str) -> str:
    """The text with every table between `<!-- fields: NAME -->` and `<!-- end -->` as the schemas have it.

    Raises:
        InputError: a table's place is missing, or names no table.
    """
    places = re.findall(r"<!-- fields: (\w+) -->\n.*?<!-- end -->", text, re.S)
    if sorted(places) != sorted(TABLES):
        raise InputError(f"has the tables {', '.join(places) or '(none)'}; valid: {', '.join(TABLES)}")
    for name, fields in TABLES.items():
        begin = f"<!-- fields: {name} -->\n"
        start = text.index(begin) + len(begin)
        text = text[:start] + table(fields) + "\n" + text[text.index("<!-- end -->", start) :]
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m src.records", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--write", required=True, type=Path, metavar="FILE", help="docs/results.md")
    path: Path = parser.parse_args(argv).write
    try:
        write_whole(path, filled(path.read_text(encoding="utf-8")))
    except (InputError, OSError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
