"""How many entries each layer and KV head holds, where they differ: a map per cell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from src.compare.analysis import Analysis
from src.compare.matched import Study
from src.compare.runs import show_budget
from src.records.record import Record
from src.report.figures import INK, LOOK, new_figure, plain_text

MAPS_IN_A_ROW = 6
FACTOR = 3.0  # log2 of the largest share of the mean that the colours tell apart
NORM = TwoSlopeNorm(0, -FACTOR, FACTOR)


def mean_counts(records: Iterable[Record]) -> NDArray[np.float64] | None:
    """Entries after the prompt, mean over samples, `(layers, kv_heads)`; `(layers, 1)` where only layers differ.

    None: all layers and heads of every sample hold equally many, or it is not known.
    """
    found = [counts for record in records if (counts := by_layer((record.kept or {}).get("prompt"))) is not None]
    if not found:
        return None
    heads = max(counts.shape[1] for counts in found)
    if len({len(counts) for counts in found}) > 1:
        return None
    return np.mean([np.broadcast_to(counts, (len(counts), heads)) for counts in found], axis=0)


def by_layer(kept: Any) -> NDArray[np.float64] | None:
    """A record's counts as an array; None for one number, or what is no list of numbers of one shape."""
    if not isinstance(kept, list):
        return None
    try:
        counts = np.array([layer if isinstance(layer, list) else [layer] for layer in kept], dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return counts if counts.ndim == 2 and counts.size else None


def counts_map(analysis: Analysis) -> Figure | None:
    """Layers upwards, KV heads to the right: the share of the cell's mean. None where all cells hold alike."""
    study = analysis.study
    maps = cells_with_counts(study)
    if not maps:
        return None
    with matplotlib.rc_context(LOOK):
        columns = min(len(maps), MAPS_IN_A_ROW)
        lines = -(-len(maps) // columns)
        figure = new_figure(1.75 * columns + 1.6, 2.5 * lines + 0.9)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes in grid[len(maps) :]:
            axes.set_visible(False)
        image = None
        for i, (axes, (label, budget, counts)) in enumerate(zip(grid, maps, strict=False)):
            shares = np.log2(np.maximum(counts, 1e-9) / counts.mean()).clip(-FACTOR, FACTOR)
            image = axes.imshow(
                shares, aspect="auto", origin="lower", cmap="PuOr_r", norm=NORM, interpolation="nearest"
            )
            name = plain_text(study.shown(label)).replace(" ", "\n", 1)
            axes.set_title(f"{name}, {show_budget(budget)}\n{counts.min():.0f} to {counts.max():.0f}", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.xaxis.set_visible(counts.shape[1] > 1)
            axes.tick_params(labelsize=8)
            if i % columns == 0:
                axes.set_ylabel("layer", fontsize=9)
        n = sorted({len(run.records) for run in study.runs})
        samples = f"n = {n[0]} samples" if len(n) == 1 else f"n = {n[0]} to {n[-1]} samples"
        title = f"Entries by layer and KV head after the prompt: {samples}"
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        figure.supxlabel("KV head (one column: all heads of a layer hold alike)", fontsize=9)
        if image is not None:
            bar = figure.colorbar(image, ax=grid.tolist(), ticks=range(-int(FACTOR), int(FACTOR) + 1))
            bar.set_label("entries, of the cell's mean", color=INK)
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda power, _: f"x {2.0**power:g}"))
            bar.ax.tick_params(labelsize=8)
    return figure


def cells_with_counts(study: Study) -> list[tuple[str, Any, NDArray[np.float64]]]:
    """Label, budget and counts of the runs whose layers or heads differ, by label."""
    found = []
    for label in study.labels:
        for run in study.runs:
            counts = mean_counts(run.records.values()) if run.label == label else None
            if counts is not None and counts.max() - counts.min() > 0:
                found.append((label, run.budget, counts))
    return found
