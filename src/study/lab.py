"""What the notebooks have in common: where their tables come from, what may be compared, how figures look.

A study's tables (`src.study` says what is in them) come from its run folders in `results/<study>` when there
are any, else from the committed `results/study/<study>`; `Tables.source` says which.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.compare.marks import own_reconstructions
from src.compare.runs import show_budget
from src.errors import InputError
from src.study.collect import TABLES, collect
from src.study.retention_tables import DECILES

RESULTS = Path(__file__).resolve().parents[2] / "results"
GREYS = ("0.0", "0.35", "0.55", "0.7")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Tables:
    """A study's tables, each with a `label` column (policy and options), and where they came from."""

    study: str
    source: str
    cells: pd.DataFrame
    retention: pd.DataFrame
    octaves: pd.DataFrame
    differences: pd.DataFrame

    @property
    def model(self) -> str:
        return str(self.cells["model"].iloc[0])

    @property
    def budgets(self) -> list[float]:
        return sorted(self.cells["budget"].dropna().unique())

    @property
    def all_tasks(self) -> pd.DataFrame:
        """One row per policy and budget."""
        return self.cells[self.cells["task"] == "all"]

    def facts(self, n: int | None = None) -> str:
        """What a figure must say about its data."""
        samples = int(self.all_tasks["n"].max()) if n is None else n
        return f"{self.model}, n = {samples} prompts{self.reconstructions}"

    @property
    def reconstructions(self) -> str:
        """Which of the policies are reconstructions: `; ahakv: our reconstruction`. Nothing if none is."""
        there = set(self.cells["policy"])
        found = [name for (name, _), _ in own_reconstructions() if name in there]
        return f"; {', '.join(found)}: our reconstruction{'s' if len(found) > 1 else ''}" if found else ""


def load(study: str, root: str | Path | None = None, baseline: str | None = None, min_prompt: int = 0) -> Tables:
    """The tables of `study`, and a line about where they come from.

    Args:
        root: the folder that holds <study>/ and study/<study>/; None: this checkout's `results`.
        baseline, min_prompt: see `src.study.collect.collect`; the committed tables have theirs in their README.

    Raises:
        InputError: neither run folders nor study tables; runs of several models (named); an older
            retention file.
    """
    root = Path(root or RESULTS)
    runs, committed = root / study, root / "study" / study
    if any(runs.rglob("metrics.json")):
        frames = collect([runs], baseline, min_prompt)[0]
        source = f"run folders in {runs}"
    elif (committed / "cells.csv").exists():
        frames = {name: read(committed / f"{name}.csv") for name in TABLES}
        source = f"the committed study tables in {committed}, because {runs} holds no finished run"
    else:
        raise InputError(
            f"no results: neither finished runs in {runs} nor tables in {committed}; "
            f"run: python -m src.sweep experiment={study}"
        )
    for frame in frames.values():
        frame["label"] = (frame["policy"] + " " + frame["options"].fillna("")).str.strip()
    tables = Tables(study, source, **frames)
    refuse_several_models(tables)
    print(f"{study}: {tables.model}, {len(tables.all_tasks)} cells from {source}{tables.reconstructions}")
    return tables


def read(path: Path) -> pd.DataFrame:
    """One committed table; empty options are text, not missing numbers."""
    try:
        frame = pd.read_csv(path, dtype={"options": str, "policy": str, "model": str}, keep_default_na=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error})") from None
    return frame.assign(options=frame["options"].fillna("")) if "options" in frame else frame


def refuse_several_models(tables: Tables) -> None:
    models = sorted(set(tables.cells["model"]))
    if len(models) > 1:
        raise InputError(
            f"{tables.study}: results of different models ({', '.join(models)}) in one comparison; "
            "valid: one model, move the others' folders away"
        )


def need(tables: Tables, *labels: str) -> None:
    """Refuse a study that lacks one of these cells, or was run without fidelity; the message names what is missing."""
    missing = [label for label in labels if label not in set(tables.all_tasks["label"])]
    if missing:
        raise InputError(f"{tables.study}: no run of {', '.join(missing)} in {tables.source}; this notebook needs them")
    if tables.all_tasks["kl"].isna().all():
        raise InputError(f"{tables.study}: the runs in {tables.source} lack fidelity; run them with fidelity=true")


def at_budget(tables: Tables, budget: float | None = None) -> Tables:
    """The study at one budget, the full cache beside it.

    Raises:
        InputError: several budgets and none chosen (they are named), or one that is not there.
    """
    known = ", ".join(show_budget(b) for b in tables.budgets)
    if budget is None and len(tables.budgets) != 1:
        raise InputError(f"{tables.study}: results of different budgets ({known}) in one comparison; choose BUDGET")
    budget = tables.budgets[0] if budget is None else budget
    if budget not in tables.budgets:
        raise InputError(f"BUDGET={budget}: not in these results; valid: {known}")

    def here(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[(frame["budget"] == budget) | frame["budget"].isna()]

    frames = {name: here(getattr(tables, name)) for name in TABLES}
    return Tables(tables.study, tables.source, **frames)


def deciles(tables: Tables, label: str, part: str = "heavy") -> pd.DataFrame | None:
    """The ten decile shares of one policy in order, or None where it has no such part."""
    rows = tables.retention
    rows = rows[(rows["label"] == label) & (rows["part"] == part)].set_index("measure")
    return rows.loc[list(DECILES)] if set(DECILES) <= set(rows.index) else None


def measure(tables: Tables, name: str, part: str = "heavy") -> pd.DataFrame:
    """One retention measure of every policy."""
    rows = tables.retention
    return rows[(rows["measure"] == name) & (rows["part"] == part)].set_index("label")


def verdict(claim: str, holds: bool | None, evidence: str) -> str:
    """One sentence: a claim, whether the data support it, and the numbers. None: the data cannot say."""
    word = {True: "holds here", False: "does NOT hold here", None: "cannot be decided on these data"}[holds]
    return f"{claim}: {word} ({evidence})."


def apart(low: float, high: float, other_low: float, other_high: float) -> bool | None:
    """True if the first interval lies above the second, False if below, None where they overlap."""
    return True if low > other_high else False if high < other_low else None


# --- figures ---


def greyscale() -> None:
    """Figures that need no colour: grey tones, line styles and markers all differ."""
    styles = cycler(color=GREYS) * cycler(linestyle=LINES)
    marks = cycler(marker=[MARKERS[i % len(MARKERS)] for i in range(len(styles))])
    plt.rcParams.update(
        {
            "axes.prop_cycle": styles + marks,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "lines.markersize": 4,
            "savefig.dpi": 150,
        }
    )


def save(figure: Figure, name: str) -> None:
    """Also as NAME.png in the folder that the environment variable FIGURES names (`make notebooks` sets it)."""
    folder = os.environ.get("FIGURES")
    if folder:
        figure.savefig(Path(folder) / f"{name}.png")


def dots(axes: Axes, names: Sequence[str], frame: pd.DataFrame, value: str, low: str, high: str) -> None:
    """One dot per row with its interval, the first name on top."""
    there = frame.reindex(list(names))
    place = np.arange(len(there))[::-1]
    values = there[value].to_numpy(dtype=float)
    whiskers = np.abs(there[[low, high]].to_numpy(dtype=float).T - values)
    axes.errorbar(values, place, xerr=np.nan_to_num(whiskers), fmt="o", color="0.0", ecolor="0.5", capsize=2)
    axes.set_yticks(place, list(names))
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
