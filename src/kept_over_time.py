"""What is cached as the output grows: output position against kept position, for SCOPE against a unified policy.

`kept_over_time=8` in a run or sweep notes the cached positions every 8 output tokens and writes, per sample, a small
`kept_over_time/<task>-<id>.npz` into the run's folder. Several runs of one sample beside each other:

    python -m src.kept_over_time OUT.png RUN_FOLDER RUN_FOLDER ... [--sample gsm8k_30-0]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from src.engine import Engine, Lane
from src.errors import InputError
from src.jobs import Generation
from src.lanes import LaneBatch
from src.reporting.runs import check_comparable, label_runs, load_run, show_budget

FOLDER = "kept_over_time"
BINS = 256  # at most, over prompt and output


@dataclass
class Trace:
    """Shares of the text's positions that were cached, mean over layers and KV heads.

    Attributes:
        prompt_tokens: the first output token has this position.
        width: positions per bin.
        steps: output tokens read so far, one per row.
        shares: rows of `(bins,)`, 0 to 1.
    """

    prompt_tokens: int
    width: int
    steps: list[int] = field(default_factory=list)
    shares: list[np.ndarray] = field(default_factory=list)

    def note(self, step: int, kept: Sequence[Tensor]) -> None:
        """`kept`: per layer, original positions `(kv_heads, k)`."""
        bins = torch.stack([torch.bincount((layer // self.width).flatten(), minlength=BINS) for layer in kept])
        heads = sum(layer.shape[0] for layer in kept)
        self.steps.append(step)
        self.shares.append((bins.sum(0) / (heads * self.width)).cpu().numpy())

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        shares = np.stack(self.shares).astype(np.float32)
        np.savez_compressed(
            path, shares=shares, prompt_tokens=self.prompt_tokens, width=self.width, steps=np.array(self.steps)
        )

    @classmethod
    def load(cls, path: Path) -> Trace:
        with np.load(path) as found:
            shares = list(found["shares"])
            return cls(int(found["prompt_tokens"]), int(found["width"]), found["steps"].tolist(), shares)


class TracingEngine(Engine):
    """An engine that keeps a `Trace` of every lane it has not handed out yet.

    Args:
        every: output tokens between two looks.
    """

    def __init__(self, model: Any, max_lanes: int, every: int) -> None:
        super().__init__(model, max_lanes)
        self.every = every
        self._traces: dict[tuple[str, int], tuple[Generation, Trace]] = {}

    def _step(self, batch: LaneBatch, lanes: list[Lane], *rest: Any) -> None:
        super()._step(batch, lanes, *rest)
        if batch.t % self.every:
            return
        for row, lane in enumerate(lanes):
            if lane.targets is None:
                caches, at = batch.locate(row)
                self._of(lane.result).note(batch.t, [c.positions[at, :, : c.used[at]] for c in caches])

    def trace(self, result: Generation) -> Trace:
        """A finished lane's, once."""
        trace = self._of(result)
        del self._traces[result.request.name, id(result.variant)]
        return trace

    def _of(self, result: Generation) -> Trace:
        request, key = result.request, (result.request.name, id(result.variant))
        found = self._traces.get(key)
        if found is None or found[0] is not result:  # another try, after memory ran out, starts afresh
            width = -(-(len(request.ids) + request.max_new_tokens) // BINS)
            scope = len(request.ids) if request.context_tokens is None else request.context_tokens
            found = self._traces[key] = (result, Trace(scope, width))
            found[1].note(0, result.kept_prompt)
        return found[1]


def trace_path(run: Path, record: Mapping[str, Any]) -> Path:
    return run / FOLDER / (re.sub(r"[^\w.-]", "_", f"{record['task']}-{record['id']}") + ".npz")


def plot(traces: Mapping[str, Trace], path: Path, title: str) -> None:
    """A panel per run: tokens read across, positions of the text upwards, the line is the end of the prompt."""
    figure = Figure((3.2 * len(traces) + 1.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(traces), sharey=True, squeeze=False)
    image = None
    for axis, (name, trace) in zip(axes[0], traces.items(), strict=True):
        shares = np.stack(trace.shares).T
        last = trace.prompt_tokens + trace.steps[-1]
        edges = np.arange(shares.shape[0] + 1) * trace.width
        steps = np.append(trace.steps, 2 * trace.steps[-1] - trace.steps[-2] if len(trace.steps) > 1 else 1)
        image = axis.pcolormesh(steps, edges, shares, vmin=0, vmax=1, cmap="cividis", rasterized=True)
        axis.axhline(trace.prompt_tokens, color="white", linewidth=0.8)
        axis.set(title=name, xlabel="output tokens read", ylim=(0, last), xlim=(0, steps[-1]))
    axes[0, 0].set_ylabel("position in the text")
    if image is not None:
        figure.colorbar(image, ax=axes[0].tolist(), label="share kept (layers and KV heads)")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Policy, options and budget of every run, each name once.

    Raises:
        InputError: not a finished run's folder, or runs that cannot be compared (other models, prompts, ...).
    """
    runs = [load_run(folder) for folder in folders]
    check_comparable(runs)
    return [f"{run.label}, budget {show_budget(run.budget)}" for run in label_runs(runs)]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m src.kept_over_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the picture")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs made with kept_over_time=N")
    parser.add_argument("--sample", help="TASK-ID; default: the first that all runs have")
    wanted = parser.parse_args(arguments)
    try:
        there = [{p.stem for p in (run / FOLDER).glob("*.npz")} for run in wanted.runs]
        common = sorted(set.intersection(*there))
        if not common or (wanted.sample or common[0]) not in common:
            found = ", ".join(common) or "none (were they made with kept_over_time=N?)"
            raise InputError(f"--sample {wanted.sample}: samples that all runs have: {found}")
        sample = wanted.sample or common[0]
        names = names_of(wanted.runs)
        traces = {
            name: Trace.load(run / FOLDER / f"{sample}.npz") for name, run in zip(names, wanted.runs, strict=True)
        }
        plot(traces, wanted.out, f"What is cached as the output grows: {sample}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"picture: {wanted.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
