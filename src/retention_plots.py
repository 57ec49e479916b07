"""The picture of a run's retention: where in the prompt the kept entries lie, overall and per layer."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from src.retention_store import BINS
from src.retention_summary import Profile

MAP = (
    "cividis"  # perceptually uniform, and its lightness rises evenly: the same order in print without colour
)


def plot_retention(data: Profile, path: Path, title: str) -> None:
    """Histogram over relative position (all layers and heads) above a heat map of layers by 64 bins."""
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, no global state of pyplot
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.35])
    samples = len(data.rows)
    figure.suptitle(title, fontsize=11)
    draw_histogram(top, data)
    top.set_title(f"{samples} samples, {data.layers} layers, {data.heads} KV heads", fontsize=9)
    image = draw_layers(bottom, data)
    bottom.set_xlabel("relative position in the prompt (0 = first token, 1 = last)")
    figure.colorbar(image, ax=bottom, label="positions kept (%)", pad=0.02)
    figure.savefig(path, dpi=150)


def draw_histogram(axes: Axes, data: Profile) -> None:
    """Share of a head's kept entries per bin, in percent, with the level of a policy without preference."""
    edges = np.linspace(0, 1, BINS + 1)
    axes.stairs(100 * data.histogram(), edges, fill=True, color="0.35", label="kept")
    axes.axhline(
        100 / BINS, color="black", linestyle="--", linewidth=1, label=f"uniform ({100 / BINS:.2f} %)"
    )
    axes.set_ylabel("share of kept entries\nper bin (%)")
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_layers(axes: Axes, data: Profile) -> AxesImage:
    """Of each bin's positions, the percentage that a head of the layer keeps. One scale, 0 to 100, for all
    runs.
    """
    image = axes.imshow(
        100 * data.layer_occupancy(),
        aspect="auto",
        origin="lower",
        extent=(0, 1, -0.5, data.layers - 0.5),
        cmap=MAP,
        norm=PowerNorm(0.5, vmin=0, vmax=100),  # small budgets keep few percent; a linear scale hides them
        interpolation="nearest",
    )
    axes.set_ylabel("layer")
    return image
