"""Finished runs: found in folders, refused where they cannot be compared, and named."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from evals.visible import visible
from src.compare.marks import MARK, reconstruction
from src.compare.stored import (
    AGAIN,
    disagreement,
    flat,
    recomputed,
    stored_environment,
    stored_metrics,
    stored_records,
    stored_settings,
)
from src.errors import InputError
from src.records.files import PREDICTIONS
from src.records.record import Record
from src.records.seal import why_unreadable
from src.retention.store import Key

CONF = Path(__file__).resolve().parents[2] / "conf"
FINGERPRINT = "model_fingerprint"  # among the comparability fields: what the model's files held
# Settings that choose where and how much is run, not what comes out of a sample.
NOT_AN_OUTCOME = {
    "tasks",
    "limit",
    "lanes",
    "max_lanes",
    "output_root",
    "wandb",
    "overwrite",
    "hydra",
    "budget",
}


@dataclass(frozen=True)
class Run:
    """One finished run: a policy with its options at one budget."""

    folder: Path
    policy: str
    budget: int | float | None
    model: str
    metrics: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    records: dict[Key, Record] = field(repr=False)
    label: str = ""
    reconstruction: str = ""  # where the policy's formulas come from, if it is one
    notes: tuple[str, ...] = ()  # what is wrong with its files, for the reader of the report
    unchecked: bool = False  # from before files carried check values

    @property
    def full(self) -> bool:
        return self.policy == "full"

    @property
    def options(self) -> dict[str, Any]:
        policy = self.settings.get("policy")
        if not isinstance(policy, Mapping):
            return {}
        return {k: v for k, v in flat(policy).items() if k not in ("name", "_target_")}

    @property
    def shown(self) -> str:
        """The label for people: `ahakv (our reconstruction) score_pool=7`."""
        name = visible(self.policy)
        return f"{name} {MARK}{self.label.removeprefix(name)}" if self.reconstruction else self.label

    @property
    def cell(self) -> str:
        return self.shown if self.full or self.budget is None else f"{self.shown} at {show_budget(self.budget)}"


def find_runs(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The finished runs among and below these folders, each once, and a warning for every unfinished one."""
    finished: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give run folders or a folder that holds some")
        for predictions in sorted(folder.rglob("predictions.jsonl")):
            path = predictions.parent.resolve()
            (finished if (path / "metrics.json").exists() else unfinished)[path] = None
    if not finished:
        below = f"; {len(unfinished)} unfinished (launch them again to complete)" if unfinished else ""
        raise InputError(f"{', '.join(map(str, folders))}: no finished run here (metrics.json){below}")
    return list(finished), [f"{p.name} is unfinished and left out; launch it again." for p in unfinished]


def load_run(folder: Path) -> Run:
    """A finished run: scores and sizes computed from its sound lines, the rest from verified files.

    Raises:
        InputError: a file that the report needs is damaged or says what cannot be.
    """
    stored, checked = stored_metrics(folder)
    settings = stored_settings(folder, stored)
    environment, note = stored_environment(folder)
    records, lines = stored_records(folder, checked)
    metrics = recomputed(folder, records, stored)
    notes = [note] if note else []
    if lines.damaged:
        notes.append(f"{folder.name}: {lines.complaint(PREDICTIONS)}, left out; {AGAIN} to redo them.")
    if differs := disagreement(stored, metrics):
        notes.append(f"{folder.name}: {differs}; {AGAIN} to bring them together.")
    return Run(
        folder,
        stored["policy"],
        stored.get("budget"),
        visible(stored["model"]),
        metrics,
        settings,
        environment,
        {record.key: record for record in records},
        notes=tuple(notes),
        unchecked=not checked and lines.before,
        reconstruction=reconstruction(stored, settings),
    )


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse several models, and other comparability fields: such numbers mean different things."""
    first = runs[0]
    for run in runs[1:]:
        if run.model != first.model:
            raise InputError(
                f"model: {first.model} in {first.folder.name}, {run.model} in {run.folder.name}; "
                "a report holds one model, make one for each"
            )
    for run in runs[1:]:
        ours, theirs = (flat(r.metrics.get("comparability") or {}) for r in (first, run))
        for name in sorted({*ours, *theirs}):
            a, b = ours.get(name, "not recorded"), theirs.get(name, "not recorded")
            if name.startswith("task_versions.") and "not recorded" in (a, b):
                continue  # other tasks are no conflict
            if name == FINGERPRINT and "not recorded" in (a, b):
                continue  # a run of an earlier version: read, with a warning
            if a != b:
                raise InputError(
                    f"{name}: {_plain(a)} in {first.folder.name}, {_plain(b)} in {run.folder.name}; runs "
                    "that differ in it cannot be compared, report them apart"
                )


def label_runs(runs: Sequence[Run]) -> list[Run]:
    """Name each policy, with options that differ from conf/policy or among runs: `snapkv kernel=1`."""
    labelled: list[Run] = []
    for run in runs:
        alike = [r.options for r in runs if r.policy == run.policy]
        written = _defaults(run.policy)
        defaults = {k: v for k, v in written.items() if "${" not in str(v)}  # a seed that follows the run's
        varied = [k for k in sorted(run.options) if any(o.get(k) != run.options[k] for o in alike)]
        changed = [k for k in sorted(run.options) if k in defaults and defaults[k] != run.options[k]]
        shown = changed if defaults else varied
        shown += [k for k in varied if k not in shown and k not in defaults]
        if "decode_budget" in run.options and "decode_budget" not in shown:
            shown.append("decode_budget")  # `budget` is the sum, which does not say how it is split
        words = [run.policy, *(f"{k}={_short(run.options[k])}" for k in shown)]
        labelled.append(replace(run, label=visible(" ".join(words if not run.full else words[:1]))))
    return _tell_apart(labelled)


def _tell_apart(runs: list[Run]) -> list[Run]:
    """Where two runs of one cell differ in a setting outside the policy (a seed), show it; else refuse."""
    cells: dict[tuple[str, Any], list[int]] = {}
    for i, run in enumerate(runs):
        cells.setdefault((run.label, run.budget), []).append(i)
    for (label, budget), members in cells.items():
        settings = [_outcome_settings(runs[i]) for i in members]
        for a, b in combinations(range(len(members)), 2):
            if settings[a] == settings[b]:
                one, other = (runs[members[i]].folder for i in (a, b))
                raise InputError(f"{label} at budget {show_budget(budget)} is there twice: {one} and {other}; give one")
        names = sorted({k for s in settings for k in s if any(o.get(k) != s[k] for o in settings)})
        for i, s in zip(members, settings, strict=True):
            words = [runs[i].label, *(f"{k}={_plain(s.get(k))}" for k in names)]
            runs[i] = replace(runs[i], label=visible(" ".join(words)))
    return runs


def cell_columns(run: Run) -> dict[str, Any]:
    """The columns that say which cell a table's row is about."""
    options = run.label.removeprefix(visible(run.policy)).strip()
    return {"model": run.model, "policy": run.policy, "options": options, "budget": None if run.full else run.budget}


def show_budget(budget: int | float | None) -> str:
    """512, or 25 % for a fraction of the prompt."""
    if budget is None:
        return "–"
    return f"{budget * 100:g} %" if budget <= 1 else f"{budget:g}"


def budget_order(budget: int | float | None) -> tuple[bool, float]:
    """Fractions of the prompt and entries are different units: fractions come first."""
    return (budget is None or budget > 1, float(budget or 0))


def _outcome_settings(run: Run) -> dict[str, Any]:
    flattened = flat(run.settings)
    return {k: v for k, v in flattened.items() if k.split(".")[0] not in NOT_AN_OUTCOME and k.split(".")[0] != "policy"}


def _short(value: Any) -> str:
    """Of a path its last part: names stand in legends and table heads."""
    return Path(value).name if isinstance(value, str) and "/" in value else _plain(value)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _defaults(policy: str) -> dict[str, Any]:
    """conf/policy's own options; nothing for a policy that is not there, or whose name is no file's."""
    path = CONF / "policy" / f"{policy}.yaml"
    if not re.fullmatch(r"\w[\w.-]{0,99}", policy) or not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable ({why_unreadable(error)})") from None
    return flat(content) if isinstance(content, dict) else {}
