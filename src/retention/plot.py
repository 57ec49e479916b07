"""The picture of a run's retention: where in the prompt the kept entries lie, overall and per layer."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from evals.visible import shortened
from src.retention.profile import Profile
from src.retention.store import BINS

MAP = "cividis"  # perceptually uniform, and its lightness rises evenly: the same order in print without colour
TICKS = (0, 1, 5, 10, 25, 50, 75, 100)


def plot_retention(data: Profile, path: Path, title: str) -> None:
    """Histogram over relative position (all layers and heads) above a heat map of layers by 64 bins, as a PNG."""
    figure = Figure(figsize=(6.4, 5.4))
    FigureCanvasAgg(figure)  # no window system, none of pyplot's global state
    grid = {"left": 0.12, "right": 0.9, "bottom": 0.09, "top": 0.9, "wspace": 0.04, "hspace": 0.1}
    panels = figure.subplots(2, 2, height_ratios=[1, 1.45], width_ratios=[1, 0.028], gridspec_kw=grid)
    top, unused, bottom, bar = panels.flat
    unused.remove()
    draw_histogram(top, data)
    top.tick_params(labelbottom=False)
    lengths = [row["n"] for row in data.rows]
    among = f"{min(lengths):,} to {max(lengths):,}" if min(lengths) < max(lengths) else f"{max(lengths):,}"
    top.text(0, 1.14, shortened(title, 90), parse_math=False, transform=top.transAxes, fontsize=11)
    facts = f"n = {len(lengths)} prompts of {among} tokens, {data.layers} layers, {data.heads} KV heads"
    top.text(0, 1.04, facts, transform=top.transAxes, fontsize=9)
    image = draw_layers(bottom, data)
    bottom.set_xlabel("relative position in the prompt (0 = first token, 1 = last)")
    figure.colorbar(image, cax=bar, label="positions kept (%)", ticks=TICKS)
    figure.align_ylabels([top, bottom])
    figure.savefig(path, format="png", dpi=150)


def draw_histogram(axes: Axes, data: Profile) -> None:
    """Share of a head's kept entries per bin, in percent, with the level of a policy without preference."""
    edges = np.linspace(0, 1, BINS + 1)
    axes.stairs(100 * data.histogram(), edges, fill=True, color="0.4", label="all layers and heads")
    level = 100 / BINS
    axes.axhline(level, color="black", linestyle="--", linewidth=1, label=f"no preference ({level:.2f} %)")
    axes.set_ylabel("share of kept entries\nper bin (%)")
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, fontsize=8, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)


def draw_layers(axes: Axes, data: Profile) -> AxesImage:
    """Of each bin's positions, the percentage that a head of the layer keeps, on one scale for all runs."""
    image = axes.imshow(
        100 * data.layer_occupancy(),
        aspect="auto",
        origin="lower",
        extent=(0, 1, -0.5, data.layers - 0.5),
        cmap=MAP,
        norm=PowerNorm(0.5, vmin=0, vmax=100),  # small budgets keep few percent; a linear scale hides them
        interpolation="nearest",
    )
    axes.set_ylabel("layer (0 = first)")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return image
