"""Random damage to a finished or an unfinished study's folder, and what the report and the same command make of it."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from cli import Result, call

from src.errors import InputError
from src.records import RunFolder
from src.report import as_numbers
from src.reporting.analysis import analyse
from src.reporting.data import make_study
from src.reporting.formats import Table, comma_separated, markdown
from src.reporting.html import page
from src.reporting.kept import retention_table
from src.reporting.overlap import overlap_table
from src.reporting.samples import contrasts, retention_maps
from src.reporting.tables import make_tables, tasks_table

GRID = ["policies=[full,h2o,snapkv,{name: hcattention, quantise_keys: false}]", "budgets=[40]", "kept_over_time=4"]


# --- damage ---


def flip_bit(data: bytearray, draw: random.Random) -> bytearray:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def change_digit(data: bytearray, draw: random.Random) -> bytearray:
    """A digit becomes another; where there is none, a byte does."""
    places = [i for i, byte in enumerate(data) if byte in b"0123456789"]
    if not places:
        return flip_bit(data, draw)
    place = draw.choice(places)
    data[place] = draw.choice([digit for digit in b"0123456789" if digit != data[place]])
    return data


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def zero_block(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.choice([1, 8, 64, 512, 4096]))
    data[start:stop] = bytes(stop - start)
    return data


KINDS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (flip_bit, change_digit, cut, zero_block)


def damage(root: Path, draw: random.Random) -> str:
    """Damage one file below `root` in one way; returns which and how. Every kind of file is equally likely."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    kinds = sorted({_kind(path) for path in files})
    kind = draw.choice(kinds)
    path = draw.choice([path for path in files if _kind(path) == kind])
    change = draw.choice(KINDS)
    path.write_bytes(change(bytearray(path.read_bytes()), draw))
    return f"{change.__name__} in {path.relative_to(root)}"


def _kind(path: Path) -> str:
    return path.parent.name if path.suffix == ".npz" and path.stem != "retention" else path.name


# --- what comes of it ---


@dataclass(frozen=True)
class Shown:
    """What a report shows.

    Attributes:
        tables: every table as CSV, by name, and the page without its alarms.
        words: notes and warnings, or the one line of an error. With one of them a table may differ from a sound one.
    """

    tables: dict[str, str]
    words: frozenset[str]


def report(root: Path) -> Shown:
    """All but the pictures, which take a second. Anything but an InputError goes through."""
    try:
        study = make_study([root])
        analysis = analyse(study, resamples=1000)
        tables: list[Table] = [*make_tables(analysis), tasks_table(analysis)]
        tables += [table for table in (retention_table(analysis), overlap_table(analysis)) if table]
        warnings = retention_maps(study)[1]
        text = page(analysis, tables, {}, contrasts(study))
        as_numbers(analysis)
        for table in tables:
            markdown(table).encode()
    except InputError as error:
        return Shown({}, frozenset([str(error)]))
    for warning in study.warnings:
        assert "\n" not in warning
    shown = {table.name: comma_separated(table) for table in tables}
    shown["page"] = text.split("</section>", 1)[1]  # the first section holds the alarms
    noted = {table.note for table in tables}
    return Shown(shown, frozenset([*study.warnings, *warnings, *noted]))


@contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    """The lines that the harness logs meanwhile, which a user sees on stderr."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("src")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def resume(arguments: list[str]) -> tuple[Result, frozenset[str]]:
    """The same command again: its result and what it said about damage."""
    with warnings_of_ours() as warned:
        done = call("sweep", *arguments)
    spoken = [line for line in done.err.splitlines() if line.startswith("error: ") or "ran again" in line]
    return done, frozenset([*warned, *spoken])


@dataclass(frozen=True)
class Study:
    """A study on disk, what its command is, and what is right before and after that is launched again."""

    root: Path
    arguments: list[str]
    before: Shown
    after: Shown


def make(base: list[str], root: Path, finished: bool) -> Study:
    """A small study of four cells; unfinished, it was killed before its second call could write its tables."""
    arguments = [*base, *GRID, "tasks.names=[needle,few_shot]", f"output_root={root}"]
    assert call("sweep", *arguments, "limit=2").code == 0
    arguments.append("limit=3")
    if finished:
        assert call("sweep", *arguments).code == 0
    else:
        with mock.patch.object(RunFolder, "finish", side_effect=InputError("killed")):
            assert call("sweep", *arguments).code == 2
    before = report(root)
    whole = root.with_name(f"{root.name}-whole")
    shutil.copytree(root, whole)
    done, said = resume([*arguments, f"output_root={whole}"])
    assert done.code == 0 and not said, done.err
    return Study(root, arguments, before, report(whole))


def try_damage(study: Study, scratch: Path, seed: int) -> list[str]:
    """One random damage to a copy of the study; what is wrong with what comes of it (nothing: it is well).

    Raises:
        Exception: a traceback that a user would have seen.
    """
    copy = scratch / str(seed)
    shutil.copytree(study.root, copy)
    what = f"seed {seed}: {damage(copy, random.Random(seed))}"
    wrong = []
    seen = report(copy)
    if seen.tables != study.before.tables and not seen.words - study.before.words:
        wrong.append(f"{what}: the report differs without a word in {_different(seen, study.before)}")
    done, said = resume([*study.arguments, f"output_root={copy}"])
    if done.code not in (0, 2) or "Traceback" in done.err:
        wrong.append(f"{what}: the same command ends with {done.code}: {done.err}")
    seen = report(copy)
    if done.code == 0 and seen.tables != study.after.tables:
        wrong.append(f"{what}: mended, the report differs in {_different(seen, study.after)}; said {sorted(said)}")
    if done.code == 2 and not said:
        wrong.append(f"{what}: refused without a word")
    shutil.rmtree(copy)
    return wrong


def _different(one: Shown, other: Shown) -> str:
    names = [name for name in sorted({*one.tables, *other.tables}) if one.tables.get(name) != other.tables.get(name)]
    return ", ".join(names)
