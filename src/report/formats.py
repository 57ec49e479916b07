"""One table, five forms: Markdown, CSV, LaTeX (booktabs), the terminal, and plain rows for anything else."""

import csv
import io
import math
import re
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from evals.visible import csv_cell, visible
from src.compare.intervals import Interval

Value = float | int | str | None


@dataclass(frozen=True)
class TableCell:
    """What is shown, the number behind it, and how it stands out."""

    text: str
    value: Value = None
    bounds: tuple[float, float] | None = None  # of the interval, for the CSV
    bold: bool = False
    loss: float | None = None  # share of the full cache's score that is lost; shades the cell on the page

    @property
    def raw(self) -> Value:
        return self.text if self.value is None else self.value


@dataclass(frozen=True)
class Column:
    name: str
    note: str = ""  # small print under the name: metric, n
    number: bool = True
    detail: bool = False  # not in the terminal, where room is short
    pinned: bool = False  # stays in sight on the page, however wide the table
    key: str = ""  # name in the CSV, where it differs


@dataclass(frozen=True)
class Table:
    name: str  # of its files
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    breaks: frozenset[int] = frozenset()  # a line is drawn above these rows
    note: str = ""


def markdown(table: Table) -> str:
    """A GitHub table. Pipes and markup in names are escaped."""
    heads = [_md(c.name) + (f"<br>{_md(c.note)}" if c.note else "") for c in table.columns]
    lines = [f"**{_md(table.title)}**", "", f"| {' | '.join(heads)} |"]
    lines.append("|" + "|".join("---:" if c.number else "---" for c in table.columns) + "|")
    for row in table.rows:
        cells = [f"**{_md(c.text)}**" if c.bold else _md(c.text) for c in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + (f"\n{_md(table.note)}\n" if table.note else "")


def comma_separated(table: Table) -> str:
    """Numbers at full precision; an interval becomes two more columns, `<name> low` and `<name> high`.

    Text that a spreadsheet would run as a formula begins with an apostrophe.
    """
    wide = [any(row[i].bounds for row in table.rows) for i in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header: list[str] = []
    for column, bounds in zip(table.columns, wide, strict=True):
        name = column.key or column.name
        header += [csv_cell(text) for text in (name, *([f"{name} low", f"{name} high"] if bounds else []))]
    writer.writerow(header)
    for row in table.rows:
        line: list[Value] = []
        for cell, column, bounds in zip(row, table.columns, wide, strict=True):
            low, high = cell.bounds or (None, None)
            raw = cell.value if column.number else cell.raw
            line += [csv_cell(_finite(raw)), *([_finite(low), _finite(high)] if bounds else [])]
        writer.writerow(line)
    return out.getvalue()


def latex(table: Table) -> str:
    """A booktabs table; needs \\usepackage{booktabs} only."""
    layout = "".join("r" if c.number else "l" for c in table.columns)
    heads = " & ".join(_tex(c.name) for c in table.columns)
    notes = " & ".join(_tex(c.note) for c in table.columns)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}[t]",
        "  \\centering\\small",
        f"  \\caption{{{_tex(table.title)}{' ' + _tex(table.note) if table.note else ''}}}",
        f"  \\label{{tab:{table.name}}}",
        f"  \\begin{{tabular}}{{{layout}}}",
        "    \\toprule",
        f"    {heads} \\\\",
        *([f"    {notes} \\\\"] if any(c.note for c in table.columns) else []),
        "    \\midrule",
    ]
    for i, row in enumerate(table.rows):
        if i in table.breaks and i:
            lines.append("    \\midrule")
        cells = [f"\\textbf{{{_tex(c.text)}}}" if c.bold else _tex(c.text) for c in row]
        line = " & ".join(cells)
        guard = "{}" if line.startswith(("[", "*")) else ""  # or the line break before would take it for its own
        lines.append(f"    {guard}{line} \\\\")
    lines += ["    \\bottomrule", "  \\end{tabular}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def terminal(table: Table) -> RichTable:
    """For rich; what comes from outside is plain text there, never markup."""
    rich = RichTable(
        title=Text(visible(table.title), style="bold"),
        caption=Text(visible(table.note)) if table.note else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    shown = [i for i, column in enumerate(table.columns) if not column.detail]
    for i in shown:
        column = table.columns[i]
        head = Text(visible(column.name) + (f"\n{visible(column.note)}" if column.note else ""))
        rich.add_column(head, justify="right" if column.number else "left")
    for line, row in enumerate(table.rows):
        if line in table.breaks and line:
            rich.add_section()
        rich.add_row(*(Text(visible(row[i].text), style="bold green" if row[i].bold else "") for i in shown))
    return rich


def _finite(value: Value) -> Value:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def _md(text: str) -> str:
    """Backslashes are not enough where GitHub reads the text once more, for @user, #1 and links: an empty comment
    parts those."""
    text = re.sub(r"([\\|*_`<>\[\]$&~#@])", r"\\\1", visible(" ".join(text.split())))
    return re.sub(r"(?<=[#@])(?=\S)|(?<=:)(?=//)|(?<=www)(?=\.)", "<!-- -->", text)


TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": "$-$",
    "–": "--",
    "†": r"$^\dagger$",
    "Δ": r"$\Delta$",
    "×": r"$\times$",
    "|": r"\textbar{}",
}


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in visible(" ".join(text.split())))


# --- numbers for people ---


def number(value: float | None, digits: int = 1) -> str:
    """A number for people: a real minus sign, no minus before zero, a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def p_value(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def between(interval: Interval, digits: int = 1) -> str:
    """[low, high], or nothing where one sample per task leaves it unknown."""
    if math.isnan(interval.low):
        return ""
    return f"[{number(interval.low, digits)}, {number(interval.high, digits)}]"


def signed(value: float, digits: int = 1) -> str:
    text = number(value, digits)
    return f"+{text}" if value > 0 and float(f"{value:.{digits}f}") != 0 else text
