"""What is cached as the output grows: output position against kept position, for SCOPE against a unified policy.

`kept_over_time=8` in a run or sweep notes the cached positions every 8 output tokens and writes, per sample, a small
`kept_over_time/<task>-<id>.npz` into the run's folder. Of policies that keep everything and choose anew at each step
it notes what was attended to (`Policy.attended`). A report shows one sample; several runs of any sample:

    python -m src.report.kept_over_time OUT.png RUN_FOLDER RUN_FOLDER ... [--sample gsm8k_30-0]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from evals.arguments import OneLineParser
from evals.visible import shortened, visible
from src.compare.matched import Study
from src.compare.runs import check_comparable, label_runs, load_run, show_budget
from src.errors import InputError
from src.logs import log_to_stderr
from src.report.figures import LOOK, new_figure, plain_text
from src.retention.trace import TRACES, Trace

COLUMNS = 4  # panels beside each other


@matplotlib.rc_context(LOOK)
def draw(traces: Mapping[str, Trace], title: str) -> Figure:
    """A panel per run: tokens read across, positions of the text upwards, the line is the end of the prompt."""
    columns = min(len(traces), COLUMNS)
    rows = -(-len(traces) // columns)
    figure = new_figure(2.6 * columns + 1.2, 2.5 * rows + 0.9)
    panels = figure.subplots(rows, columns, sharey=True, sharex=True, squeeze=False)
    image = None
    for axis in panels.flat[len(traces) :]:
        axis.set_visible(False)
    longest = max((trace.steps[-1] + trace.every for trace in traces.values() if trace.steps), default=1)
    for axis, (name, trace) in zip(panels.flat, traces.items(), strict=False):
        if trace.steps:  # none: the answer ended before the first look
            shares = np.stack(trace.shares).T
            edges = np.arange(shares.shape[0] + 1) * trace.width
            steps = np.append(trace.steps, trace.steps[-1] + trace.every)
            norm = PowerNorm(0.5, vmin=0, vmax=100)
            image = axis.pcolormesh(steps, edges, 100 * shares, norm=norm, cmap="cividis", rasterized=True)
        axis.axhline(trace.prompt_tokens, color="white", linewidth=0.8)
        axis.set_title(plain_text(name), fontsize=8)
        axis.set(ylim=(0, trace.prompt_tokens + longest), xlim=(0, longest))
        axis.tick_params(labelsize=8)
    figure.supxlabel("output tokens read", fontsize=9)
    figure.supylabel("position in the text (tokens)", fontsize=9)
    if image is not None:
        bar = figure.colorbar(image, ax=panels.ravel().tolist(), ticks=[0, 5, 25, 50, 100])
        bar.set_label("positions kept (%), mean over layers and KV heads", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def common_samples(folders: Sequence[Path]) -> list[str]:
    """Names TASK-ID of the samples that all these runs have a trace of."""
    there = [{path.stem for path in (folder / TRACES).glob("*.npz")} for folder in folders]
    return sorted(set.intersection(*there)) if there else []


def of_study(study: Study) -> Figure | None:
    """For a report: the first sample that all runs with traces have, at the smallest budget."""
    smallest = study.budgets[:1]
    runs = [run for run in study.runs if run.budget in smallest or not run.budget]
    runs = [run for run in runs if (run.folder / TRACES).is_dir() and not run.full]
    samples = common_samples([run.folder for run in runs])
    if not samples:
        return None
    traces, damaged = {}, []
    for run in runs:
        try:
            traces[run.cell] = Trace.load(run.folder / TRACES / f"{samples[0]}.npz")
        except InputError:  # a damaged one must not cost the report
            damaged.append(run.cell)
    if not traces:
        return None
    lost = f"; damaged and left out: {', '.join(damaged)}" if damaged else ""
    return draw(traces, title_of(samples[0]) + lost)


def title_of(sample: str) -> str:
    return f"Positions kept over time: n = 1 sample, {shortened(sample)}"


def names_of(folders: Sequence[Path]) -> list[str]:
    """Policy, options and budget of every run, each name once.

    Raises:
        InputError: not a finished run's folder, or runs that cannot be compared (other models, prompts, ...).
    """
    runs = [load_run(folder) for folder in folders]
    check_comparable(runs)
    return [f"{run.shown}, budget {show_budget(run.budget)}" for run in label_runs(runs)]


def main(arguments: Sequence[str]) -> int:
    parser = OneLineParser("python -m src.report.kept_over_time", InputError, (__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the picture: .png, .pdf or .svg")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs made with kept_over_time=N")
    parser.add_argument("--sample", help="TASK-ID; default: the first that all runs have")
    log_to_stderr()
    try:
        wanted = parser.parse_args(arguments)
        if wanted.out.suffix not in (".png", ".pdf", ".svg"):
            raise InputError(f"{wanted.out}: valid: a name that ends with .png, .pdf or .svg")
        for run in wanted.runs:
            if not (run / TRACES).is_dir():
                raise InputError(f"{run}: holds no {TRACES}/; valid: the folder of a run made with kept_over_time=N")
        common = common_samples(wanted.runs)
        sample = wanted.sample or (common[0] if common else None)
        if sample not in common:
            raise InputError(f"--sample {sample}: not in all of these runs; valid: {', '.join(common) or '(none)'}")
        names = names_of(wanted.runs)
        traces = {
            name: Trace.load(run / TRACES / f"{sample}.npz") for name, run in zip(names, wanted.runs, strict=True)
        }
        try:
            draw(traces, title_of(str(sample))).savefig(wanted.out, dpi=150)
        except OSError as error:
            raise InputError(f"{wanted.out}: cannot be written ({error.strerror})") from None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"picture: {visible(str(wanted.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
