"""Random damage to a finished or an unfinished study's folder, and what the report and the same command make of it."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from evals.errors import DataError
from src.compare.analysis import analyse
from src.compare.matched import make_study
from src.config.cells import CellConfig, grid
from src.config.compose import composing
from src.config.settings import read_settings
from src.errors import InputError
from src.records.folder import RunFolder
from src.report.contrasts import contrasts, retention_maps
from src.report.formats import Table, comma_separated, markdown
from src.report.html import page
from src.report.kept import retention_table
from src.report.overlap import overlap_table
from src.report.tables import make_tables, tasks_table
from src.report.write import as_numbers
from src.session.session import Session

GRID = ["policies=[full,h2o,snapkv,{name: hcattention, quantise_keys: false}]", "budgets=[40]", "kept_over_time=4"]
ENVIRONMENT = {"versions": {"torch": "2.13.0"}, "device": "cpu", "git": {"commit": "abc123"}}


# --- damage ---

SHOWN = ("metrics.json", "predictions.jsonl")


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
    """Damage one file below `root` in one way; returns which and how.

    Half of the damages hit the two files that tables are made from; else every kind of file is equally likely.
    """
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    kinds = SHOWN if draw.random() < 0.5 else sorted({_kind(path) for path in files})
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


@contextlib.contextmanager
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


@dataclass(frozen=True)
class Command:
    """A sweep, composed once: that takes longer than everything else here."""

    cfg: DictConfig
    cells: list[CellConfig]

    def __call__(self, root: Path, limit: int = 3) -> tuple[int, frozenset[str]]:
        """Run it: the exit code, and what it said about damage. Anything but a user's error goes through."""
        cfg = OmegaConf.merge(self.cfg, {"output_root": str(root), "limit": limit})
        error = io.StringIO()
        no_picture = mock.patch(
            "src.records.folder.plot_retention", lambda data, path, title: path.write_bytes(b"drawn")
        )
        same_machine = mock.patch("src.session.session.environment", return_value=ENVIRONMENT)
        with warnings_of_ours() as said, contextlib.redirect_stderr(error), no_picture, same_machine:
            try:
                code = Session(read_settings("sweep", cfg), self.cells, lanes=8).run()  # type: ignore[arg-type]
            except (InputError, DataError) as refused:
                code = 2
                said.append(str(refused))
        return code, frozenset([*said, *(line for line in error.getvalue().splitlines() if "ran again" in line)])


def command(base: list[str]) -> Command:
    torch.set_num_threads(1)
    with composing():
        cfg = compose("sweep", overrides=[*base, *GRID, "tasks.names=[needle,few_shot]"])
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return Command(cfg, grid(plain["policies"], plain["budgets"]))


@dataclass(frozen=True)
class Study:
    """A study on disk, its command, and what is right before and after that is launched again."""

    root: Path
    command: Command
    before: Shown
    after: Shown


def make(command: Command, root: Path, finished: bool) -> Study:
    """A small study of four cells; unfinished, it was killed before its second call could write its tables."""
    assert command(root, limit=2) == (0, frozenset())
    if finished:
        assert command(root)[0] == 0
    else:
        with mock.patch.object(RunFolder, "finish", side_effect=InputError("killed")):
            assert command(root)[0] == 2
    before = report(root)
    whole = root.with_name(f"{root.name}-whole")
    shutil.copytree(root, whole)
    assert command(whole) == (0, frozenset())
    return Study(root, command, before, report(whole))


def try_damage(study: Study, scratch: Path, seed: int) -> list[str]:
    """One random damage to a copy of the study; what is wrong with what comes of it (nothing: it is well).

    A traceback that a user would have seen is one of them.
    """
    copy = scratch / f"{study.root.parent.name}-{seed}"
    shutil.copytree(study.root, copy)
    what = f"seed {seed}: {damage(copy, random.Random(seed))}"
    wrong = []
    try:
        seen = report(copy)
        if seen.tables != study.before.tables and not seen.words - study.before.words:
            wrong.append(f"{what}: the report differs without a word in {_different(seen, study.before)}")
        code, said = study.command(copy)
        if code not in (0, 2):
            wrong.append(f"{what}: the same command ends with {code}")
        seen = report(copy)
        if code == 0 and seen.tables != study.after.tables:
            wrong.append(f"{what}: mended, the report differs in {_different(seen, study.after)}; said {sorted(said)}")
        if code == 2 and not said:
            wrong.append(f"{what}: refused without a word")
    except Exception:
        wrong.append(f"{what}: {traceback.format_exc()}")
    shutil.rmtree(copy)
    return wrong


def _different(one: Shown, other: Shown) -> str:
    names = [name for name in sorted({*one.tables, *other.tables}) if one.tables.get(name) != other.tables.get(name)]
    return ", ".join(names)
