"""The one door to all suites: `load_samples`."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evals import longbench, longgenbench, pocket
from evals.errors import DataError
from evals.tasks import Sample

log = logging.getLogger(__name__)

BROKEN_ROWS = ("refuse", "record")  # what becomes of a malformed row: nothing is loaded | a sample that has failed
OPTIONS = {  # a suite's own settings: the further keys of conf/tasks/*.yaml
    "pocket": (),
    "longbench": ("config_dir", "config_url", "hub_repo", "hub_revision"),
    "longgenbench": ("reference_rows", "source_url"),
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
    whose samples are generated. `options` are the suite's own further settings (`OPTIONS`).

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
    if suite == "pocket":
        samples = pocket.load(chosen, limit, seed)
    elif suite.startswith("longbench"):
        samples = longbench.load(chosen, limit, data_dir, broken=broken, **options)
    else:
        samples = longgenbench.load(chosen, limit, data_dir, broken=broken, **options)
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
    valid = OPTIONS[suite.partition("_")[0]]
    for name in options:
        if name not in valid:
            raise DataError(f"tasks.{name}: no setting of suite {suite}; it has {', '.join(valid) or 'none'}")
    return chosen


def choose_names(suite: str, names: list[str] | None) -> list[str]:
    valid = task_names(suite)
    if names is None:
        # By default LongGenBench means its shorter half, as "4K" does in the paper.
        return [name for name in valid if suite != "longgenbench" or not name.endswith(("_60", "_80"))]
    for name in names:
        if name not in valid:
            raise DataError(f"tasks.names={name}: no task of suite {suite}; valid: {', '.join(valid)}")
    if not names:
        raise DataError(f"tasks.names=[]: name at least one of {', '.join(valid)}, or null for all")
    return list(dict.fromkeys(names))


def task_names(suite: str) -> list[str]:
    """The task names of a suite or language group (longbench_en, longbench_zh), in the official order."""
    groups = {
        "pocket": list(pocket.TASKS),
        "longbench": list(longbench.TASKS),
        "longbench_en": [name for name in longbench.TASKS if name not in longbench.CHINESE],
        "longbench_zh": [name for name in longbench.TASKS if name in longbench.CHINESE],
        "longgenbench": list(longgenbench.TASKS),
    }
    if suite not in groups:
        raise DataError(f"tasks.suite={suite}: unknown; valid: {', '.join(groups)}")
    return groups[suite]
