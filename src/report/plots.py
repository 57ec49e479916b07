"""The figures of a report. Every line has its own marker and dash, so that they read without colour."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from src.compare.analysis import Analysis, Row
from src.compare.intervals import Interval
from src.compare.marks import MARK
from src.compare.runs import budget_order, show_budget
from src.report.contrasts import KeptMap
from src.report.figures import COLOURS, INK, LOOK, new_figure, plain_axes, plain_text, series_style

RATIO_MAP = "cividis"  # its lightness rises evenly: the same order in print without colour
Pick = Callable[[Row], Interval | None]


def make_figures(analysis: Analysis, retention: dict[int, KeptMap] | None = None) -> dict[str, Figure]:
    """Those that these runs can fill, by name. `retention`: column of a run -> what it kept."""
    with matplotlib.rc_context(LOOK):
        return _figures(analysis, retention or {})


def _figures(analysis: Analysis, retention: dict[int, KeptMap]) -> dict[str, Figure]:
    figures = {}
    if analysis.budgeted:
        if analysis.study.budgets:  # a policy may do without
            figures["score_vs_budget"] = score_vs_budget(analysis)
        if sum(row.total_bytes is not None for row in analysis.rows) > 1:
            figures["score_vs_bytes"] = score_vs_bytes(analysis)
        if any(row.full or row.baseline for row in analysis.rows):
            figures["differences"] = differences(analysis)
        if analysis.has_fidelity and analysis.study.budgets:
            figures["fidelity_vs_budget"] = fidelity_vs_budget(analysis)
    if retention:
        figures["retention"] = retention_maps(analysis, retention)
    return figures


def score_vs_budget(analysis: Analysis) -> Figure:
    return _budget_curves(
        analysis,
        [("average score (0 to 100)", lambda row: row.average)],
        f"Score versus budget: {_samples(analysis, analysis.rows)}",
    )


def fidelity_vs_budget(analysis: Analysis) -> Figure:
    """KL to the full cache and, where recorded, the likelihood of the reference answer."""
    labels = {"kl": "KL(full || policy) (nats per token)", "nll": "NLL of the answer (nats per token)"}
    picks: list[tuple[str, Pick]] = [
        (label, lambda row, name=name: row.fidelity.get(name))  # type: ignore[misc]
        for name, label in labels.items()
        if any(name in row.fidelity for row in analysis.budgeted)
    ]
    n = _range([i.n for row in analysis.rows for i in row.fidelity.values()])
    return _budget_curves(analysis, picks, f"Fidelity versus budget: n = {n} samples, lower is better")


def _budget_curves(analysis: Analysis, picks: Sequence[tuple[str, Pick]], title: str) -> Figure:
    """A panel per quantity and per unit of budget (entries, or fractions of the prompt)."""
    kinds = sorted({budget_order(budget)[0] for budget in analysis.study.budgets})
    panels = [(label, pick, kind) for label, pick in picks for kind in kinds]
    figure = new_figure((6.8 if len(panels) == 1 else 4.4 * len(panels)) + 2.2, 4.2)
    drawn: dict[str, Artist] = {}
    for axes, (label, pick, entries) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        budgets = [b for b in analysis.study.budgets if budget_order(b)[0] == entries]
        reference = pick(analysis.full) if analysis.full else None
        if reference and not (label.startswith("KL") and reference.estimate == 0):
            line = axes.axhline(reference.estimate, color=INK, linewidth=1.2)
            axes.axhspan(reference.low, reference.high, color=INK, alpha=0.08, linewidth=0)
            drawn.setdefault("full cache", line)
        for i, name in enumerate(analysis.study.labels):
            found = {r.run.budget: pick(r) for r in analysis.budgeted if r.run.label == name}
            points = [(b, interval) for b in budgets if (interval := found.get(b)) is not None]
            if points:
                drawn.setdefault(name, _curve(axes, points, i))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([float(b) for b in budgets]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show_budget(round(value, 6))))
        axes.set_xlabel("budget (entries per layer and KV head)" if entries else "budget (share of the prompt)")
        axes.set_ylabel(label)
        plain_axes(axes)
    figure.suptitle(f"{title}; bands: 95 % intervals", fontsize=10, x=0.01, ha="left")
    names = sorted(drawn, key=lambda name: name != "full cache")
    handles = [drawn[name] for name in names]
    texts = [plain_text(analysis.study.shown(name)) for name in names]
    figure.legend(handles, texts, loc="outside right center", frameon=False, handlelength=3.4)
    return figure


def _curve(axes: Axes, points: Sequence[tuple[float | int, Interval]], i: int) -> Artist:
    x = [float(b) for b, _ in points]
    color = COLOURS[i % len(COLOURS)]
    (line,) = axes.plot(x, [p.estimate for _, p in points], color=color, **series_style(i))
    axes.fill_between(x, [p.low for _, p in points], [p.high for _, p in points], color=color, alpha=0.15, linewidth=0)
    if len(points) == 1:
        only = points[0][1]
        bar = [[max(only.estimate - only.low, 0)], [max(only.high - only.estimate, 0)]]  # equal scores: rounding
        axes.errorbar(x, [points[0][1].estimate], yerr=bar, color=color, capsize=3, linewidth=1)
    return line


def score_vs_bytes(analysis: Analysis) -> Figure:
    """Every cell by its cost and its score; the staircase joins those that nothing cheaper beats."""
    figure = new_figure(9.0, 4.2)
    axes = figure.subplots()
    apart = any(row.memory("kv_bytes_device_mean") is not None for row in analysis.rows)
    placed = [
        (x / 2**20, row) for row in analysis.rows if (x := row.device_bytes) and not np.isnan(row.average.estimate)
    ]
    if analysis.full:
        band = analysis.full.average
        axes.axhspan(band.low, band.high, color=INK, alpha=0.08, linewidth=0)
    names = [*analysis.study.labels]
    for i, name in enumerate(names):
        shown = analysis.study.shown(name)
        own = [(x, row.average) for x, row in placed if row.run.label == name and not row.run.full]
        if own:
            style = {**series_style(i), "linestyle": "none"}
            axes.plot(
                [x for x, _ in own],
                [a.estimate for _, a in own],
                color=COLOURS[i % 8],
                label=plain_text(shown),
                **style,
            )
    for x, row in placed:
        if row.run.full:
            axes.plot(x, row.average.estimate, "*", color=INK, markersize=13, label="full cache")
    front = pareto_front([(x, row.average.estimate) for x, row in placed if not row.odd])
    if len(front) > 1:
        axes.step(
            *zip(*front, strict=True),
            where="post",
            color=INK,
            linewidth=0.9,
            label="best for its bytes",
            zorder=1,
        )
    for x, row in placed:
        if (x, row.average.estimate) in front and not row.run.full:
            spot = (x, row.average.estimate)
            axes.annotate(
                show_budget(row.run.budget), spot, (0, 7), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    where = " on the device, without codebooks," if apart else ""
    axes.set_xlabel(f"KV cache{where} after the prompt, with bookkeeping (MiB, mean over samples)")
    axes.set_ylabel("average score (0 to 100)")
    title = f"Score versus bytes: {_samples(analysis, [row for _, row in placed])}; grey: full cache's 95 % interval"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    plain_axes(axes)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def differences(analysis: Analysis) -> Figure:
    """Every paired difference with its interval, budgets as groups; filled where it is clear."""
    study, rows = analysis.study, analysis.budgeted
    picks = [("full cache", [row.full for row in rows]), (study.baseline, [row.baseline for row in rows])]
    panels = [(name, found) for name, found in picks if any(found)]
    places, labels, place = [], [], 0.0
    for i, row in enumerate(rows):
        place += 1.0 if i and rows[i - 1].run.budget == row.run.budget else 1.8
        places.append(-place)
        labels.append(f"{plain_text(row.run.shown)}  {show_budget(row.run.budget):>5}")
    names = 0.085 * max(map(len, labels))  # inches that the labels take
    figure = new_figure(3.1 * len(panels) + max(names, 2.2), 0.21 * place + 1.3)
    for axes, (name, found) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        axes.axvline(0, color=INK, linewidth=1)
        for i, (row, difference) in enumerate(zip(rows, found, strict=True)):
            if difference is None:
                continue
            interval, series = difference.interval, study.labels.index(row.run.label)
            color = COLOURS[series % len(COLOURS)]
            axes.hlines(places[i], interval.low, interval.high, color=color, linewidth=1.8)
            style = {
                **series_style(series),
                "linestyle": "none",
                "markerfacecolor": color if difference.clear else "none",
            }
            axes.plot(interval.estimate, places[i], color=color, **style)
        axes.set_yticks(places, labels)
        axes.set_xlabel(f"difference to {plain_text(study.shown(str(name)))}\n(points of the average score)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        plain_axes(axes, grid="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    pairs = [d.interval.n for _, found in panels for d in found if d]
    title = f"Paired differences: n = {_range(pairs)} samples of {_tasks(analysis)}; 95 % intervals"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


MAPS_IN_A_ROW = 7


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no point with fewer or equal bytes reaches, by bytes."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def retention_maps(analysis: Analysis, maps: dict[int, KeptMap]) -> Figure:
    """Policies beside each other, a row per budget; a panel is layers by relative position in the prompt."""
    labels = [n for n in analysis.study.labels if any(analysis.rows[i].run.label == n for i in maps)]
    budgets = [b for b in analysis.study.budgets if any(analysis.rows[i].run.budget == b for i in maps)]
    rows = [labels[i : i + MAPS_IN_A_ROW] for i in range(0, len(labels), MAPS_IN_A_ROW)]
    lines = [(budget, row) for row in rows for budget in budgets]
    columns = max(len(row) for row in rows)
    figure = new_figure(2.1 * columns + 1.6, (1.45 * len(budgets) + 0.4) * len(rows) + 0.8)
    grid = figure.subplots(len(lines), columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for line, (budget, row) in enumerate(lines):
        for axes in grid[line][len(row) :]:
            axes.set_visible(False)
        for place, label in enumerate(row):
            axes, column = grid[line][place], analysis.study.column(label, budget)
            if line % len(budgets) == 0:
                axes.set_title(_stacked(plain_text(analysis.study.shown(label))), fontsize=9)
            if place == 0:
                axes.set_ylabel(f"budget {show_budget(budget)}\nlayer", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.xaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            if column is None or column not in maps:
                axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes, color=INK, fontsize=8)
                continue
            shown = 100 * maps[column].shares
            image = axes.imshow(
                shown,
                aspect="auto",
                origin="lower",
                extent=(0, 1, -0.5, len(shown) - 0.5),
                cmap=RATIO_MAP,
                norm=PowerNorm(0.5, vmin=0, vmax=100),
                interpolation="nearest",
            )
    drawn = _range([found.n for found in maps.values()])
    title = f"Positions kept after the prompt: n = {drawn} samples, mean over KV heads"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.supxlabel("relative position in the prompt (0 = first token, 1 = last)", fontsize=9)
    if image is not None:
        bar = figure.colorbar(image, ax=grid.ravel().tolist(), label="positions kept (%)", ticks=[0, 5, 25, 50, 100])
        bar.ax.tick_params(labelsize=8)
    return figure


def _stacked(name: str) -> str:
    """Policy, mark and options on lines of their own: panels are narrow."""
    policy, mark, options = name.partition(f" {MARK}")
    return "\n".join(filter(None, (policy, MARK, options.strip()))) if mark else name.replace(" ", "\n", 1)


def _samples(analysis: Analysis, rows: Sequence[Row]) -> str:
    """How many samples stand behind each of the averages that are drawn."""
    return f"n = {_range([row.average.n for row in rows])} samples of {_tasks(analysis)}"


def _tasks(analysis: Analysis) -> str:
    tasks = len(analysis.study.tasks)
    return f"{tasks} task{'s' if tasks > 1 else ''}"


def _range(counts: Sequence[int]) -> str:
    """One number where all are equal: 96, or 90 to 96."""
    low, high = min(counts, default=0), max(counts, default=0)
    return str(high) if low == high else f"{low} to {high}"
