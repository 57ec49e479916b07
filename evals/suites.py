"""The one door to all suites: `load_samples`."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evals import longbench, longgenbench, mine, pocket
from evals.errors import DataError
from evals.tasks import Sample

log = logging.getLogger(__name__)

BROKEN_ROWS = ("refuse", "record")  # what becomes of a malformed row: nothing is loaded | a sample that has failed


@dataclass(frozen=True)
class Suite:
    """A benchmark, or a part of one.

    Attributes:
        names: its tasks, in the official order; none, where only the data says them.
        load: `(names, limit, data_dir, seed, broken, **options) -> list[Sample]`.
        options: its own settings: the further keys of its file in conf/tasks.
        usual: the tasks that are meant where none is named; all, if empty.
        deciding: options that change a sample's outcome, as no protocol does: part of a results folder's hash.
        check: raises a DataError for options that cannot be used, before anything is read.
    """

    names: tuple[str, ...]
    load: Callable[..., list[Sample]]
    options: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()
    deciding: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], None] | None = None


def load_pocket(names: list[str], limit: int | None, data_dir: str | None, seed: int, broken: str) -> list[Sample]:
    return pocket.load(names, limit, seed)  # generated: no data, and no row is broken


def load_longbench(
    names: list[str], limit: int | None, data_dir: str | None, seed: int, broken: str, **options: Any
) -> list[Sample]:
    return longbench.load(names, limit, data_dir, broken=broken, **options)


def load_longgenbench(
    names: list[str], limit: int | None, data_dir: str | None, seed: int, broken: str, **options: Any
) -> list[Sample]:
    return longgenbench.load(names, limit, data_dir, broken=broken, **options)


def load_mine(
    names: list[str], limit: int | None, data_dir: str | None, seed: int, broken: str, **options: Any
) -> list[Sample]:
    return mine.load(names, limit, broken=broken, **options)


_LONGBENCH = Suite(longbench.TASKS, load_longbench, ("config_dir", "config_url", "hub_repo", "hub_revision"))
_CHINESE = tuple(name for name in longbench.TASKS if name in longbench.CHINESE)
_ENGLISH = tuple(name for name in longbench.TASKS if name not in longbench.CHINESE)

# Every suite, by the name that `tasks.suite` gives; a new one is a line here and a file in conf/tasks.
SUITES: dict[str, Suite] = {
    "pocket": Suite(tuple(pocket.TASKS), load_pocket),
    "longbench": _LONGBENCH,
    "longbench_en": replace(_LONGBENCH, names=_ENGLISH),
    "longbench_zh": replace(_LONGBENCH, names=_CHINESE),
    "longgenbench": Suite(
        tuple(longgenbench.TASKS),
        load_longgenbench,
        ("reference_rows", "source_url"),
        # Its shorter half, as "4K" means in the paper.
        usual=tuple(name for name in longgenbench.TASKS if not name.endswith(("_60", "_80"))),
    ),
    "mine": Suite((), load_mine, ("file", *mine.DECIDING), deciding=mine.DECIDING, check=mine.check),
}


def load_samples(
    suite: str,
    names: list[str] | None,
    limit: int | None,
    data_dir: str | None,
    seed: int,
    broken: str = "refuse",
    **options: Any,
) -> list[Sample]:
    """The samples of the named tasks (all of the suite without names), at most `limit` a task.

    Samples come in the order of the files, so a larger limit extends a smaller one. `seed` matters to `pocket` only,
    whose samples are generated. `options` are the suite's own further settings.

    Rows of a task that share an id are samples of their own, equal rows too, as in the benchmarks' own scoring. In the
    order of the file they are called `id`, `id#2`, `id#3`, ... (see `distinct`).

    A malformed row anywhere in a file is a DataError that names file and line; with `broken="record"` it is a sample
    with that line as its `error`, so that the others can run.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: must be 1 or more, or null for every sample")
    if broken not in BROKEN_ROWS:
        raise DataError(f"broken_rows={broken}: valid: {', '.join(BROKEN_ROWS)}")
    chosen = check_choice(suite, names, options)
    samples = SUITES[suite].load(chosen, limit, data_dir, seed, broken, **options)
    return [with_prompt(sample, broken) for sample in distinct(samples)]


def distinct(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, no two of a task with one id: the second `x` is `x#2`.

    A name depends on the rows before it only, so neither a larger limit nor a resumed run changes it.
    """
    taken: set[tuple[str, str]] = set()
    uses: Counter[tuple[str, str]] = Counter()  # how often an id was seen: its next free number is not below
    renamed: dict[str, list[str]] = {}
    result = []
    for sample in samples:
        task, given = sample.task.name, sample.id.replace("\0", "\N{SYMBOL FOR NULL}")  # NumPy's texts end at a NUL
        name = given
        while (task, name) in taken:
            uses[task, given] += 1
            name = f"{given}#{uses[task, given] + 1}"
        taken.add((task, name))
        if name != given:
            renamed.setdefault(task, []).append(name)
        result.append(sample if name == sample.id else replace(sample, id=name))
    for task, names in renamed.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        log.warning("task %s: rows share an id; samples of their own, by their order: %s%s", task, names[0], more)
    return result


def with_prompt(sample: Sample, broken: str) -> Sample:
    """The sample; one without a single character to ask is malformed too."""
    if sample.error or sample.prompt:
        return sample
    error = f"task {sample.task.name}, sample {sample.id}: the prompt is empty"
    if broken == "refuse":
        raise DataError(error)
    return replace(sample, error=error)


def check_choice(suite: str, names: list[str] | None, options: Mapping[str, Any]) -> list[str]:
    """The tasks that these settings mean. Nothing is read for it.

    Raises:
        DataError: no such suite or task, or a setting that this suite does not have.
    """
    chosen = choose_names(suite, names)
    valid = SUITES[suite].options
    for name in options:
        if name not in valid:
            raise DataError(f"tasks.{name}: no setting of suite {suite}; it has {', '.join(valid) or 'none'}")
    if check := SUITES[suite].check:
        check(options)
    return chosen


def choose_names(suite: str, names: list[str] | None) -> list[str]:
    valid = task_names(suite)
    if names is None:
        return list(SUITES[suite].usual) or valid
    for name in names if valid else []:  # else its data says which there are
        if name not in valid:
            raise DataError(f"tasks.names={name}: no task of suite {suite}; valid: {', '.join(valid)}")
    if not names:
        raise DataError(f"tasks.names=[]: name at least one of {', '.join(valid) or 'its tasks'}, or null for all")
    return list(dict.fromkeys(names))


def task_names(suite: str) -> list[str]:
    """The task names of a suite or language group (longbench_en, longbench_zh), in the official order."""
    if suite not in SUITES:
        raise DataError(f"tasks.suite={suite}: unknown; valid: {', '.join(SUITES)}")
    return list(SUITES[suite].names)
