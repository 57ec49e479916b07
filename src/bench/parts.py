"""The parts of `src.bench`: what is measured, and against what."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch

from evals.visible import visible
from src.bench.decode import SPARE, decode_rows
from src.bench.overlap import overlap_rows, prompts
from src.bench.peers import Peer, compare
from src.bench.plain import Plain
from src.config.binding import bind, shape_of
from src.config.cells import CellConfig
from src.config.settings import BenchSettings
from src.engine.engine import Engine
from src.engine.memory import MemoryMeter, allocated_peak
from src.engine.request import Generation, Job, Request, Variant
from src.errors import InputError
from src.models.load import LoadedModel, load_model

Row = dict[str, Any]


class Bench:
    """One loaded model and the cells to compare, its policies still without it."""

    def __init__(self, cfg: BenchSettings, cells: Sequence[CellConfig]) -> None:
        self.cfg = cfg
        self.loaded: LoadedModel = load_model(cfg.model)
        self.model = self.loaded.model
        self.cells = bind(cells, self.loaded)
        self.plain = Plain(self.model)

    def prompt(self, tokens: int, number: int = 0) -> list[int]:
        """English prose that every Python ships, `tokens` of it, from a place that depends on `number`."""
        from evals.pocket import prose

        text = "\n".join(prose())
        ids = self.loaded.tokenizer.encode(text[: 12 * (tokens * (number + 2))], add_special_tokens=False)
        while len(ids) < tokens * (number + 1):
            ids = ids + ids
        return self.loaded.fit_ids(ids[tokens * number : tokens * (number + 1)])

    def request(self, ids: list[int], new_tokens: int) -> Request:
        return Request("bench", ids, frozenset(), new_tokens)

    def run(self, jobs: Sequence[Job], lanes: int) -> list[Generation]:
        return list(Engine(self.model, lanes).run(jobs))

    # The parts.

    def prefill(self) -> list[Row]:
        """Prefill seconds of every policy at its largest budget, as a ratio to the plain model's in the same turn."""
        rows = []
        for tokens in self.cfg.prompt_tokens:
            ids = self.prompt(tokens)
            cells = one_budget(self.cells)
            runs: dict[str, Callable[[], float]] = {"plain": lambda ids=ids: self.plain.prefill(ids)}  # type: ignore[misc]
            for cell in cells:
                job = Job(self.request(ids, 1), [cell.variant])
                runs[cell.shown] = lambda job=job: self.run([job], 1)[0].prefill_seconds  # type: ignore[misc]
            seconds = self.interleave(runs)
            for name, taken in seconds.items():
                ratios = [a / b for a, b in zip(taken, seconds["plain"], strict=True)]
                rows.append(
                    {
                        "part": "prefill",
                        "what": name,
                        "prompt_tokens": tokens,
                        "seconds": median(taken),
                        "ratio_to_plain": median(ratios),
                        "runs": len(taken),
                    }
                )
        return rows

    def decode(self) -> list[Row]:
        """Decode tokens/s of one lane and of plain transformers; how they change from the first prompt length on."""
        new = self.cfg.new_tokens
        requests = [self.request(self.prompt(tokens), new + SPARE) for tokens in sorted(self.cfg.prompt_tokens)]
        rows: list[Row] = []
        for cell in (None, *one_budget(self.cells)):
            name, variant = shown_name(cell), cell.variant if cell else None
            shared = {"part": "decode", "what": name, "budget": cell.budget if cell else None}
            rows += [shared | row for row in decode_rows(self.model, variant, requests, new, self.cfg.repeats, name)]
        return rows

    def grid(self) -> list[Row]:
        """All cells of the grid from shared prefills, against each cell alone with one lane, prompt by prompt."""
        new, tokens, prompts = self.cfg.new_tokens, self.cfg.grid_tokens, self.cfg.grid_prompts
        jobs = [Job(self.request(self.prompt(tokens, i), new), [c.variant for c in self.cells]) for i in range(prompts)]
        runs: dict[str, Callable[[], float]] = {
            "grid": lambda: timed(lambda: self.run(jobs, self.cfg.max_lanes)) / prompts,
            "cells one by one": lambda: timed(
                lambda: [self.run([Job(jobs[0].request, [v])], 1) for v in jobs[0].variants]
            ),
        }
        seconds = self.interleave(runs)
        ratios = [b / a for a, b in zip(seconds["grid"], seconds["cells one by one"], strict=True)]
        shared = {"part": "grid", "cells": len(self.cells), "prompt_tokens": tokens, "new_tokens": new}
        return [
            {**shared, "what": name, "seconds_per_prompt": median(taken), "ratio": median(ratios), "runs": len(taken)}
            for name, taken in seconds.items()
        ]

    def peers(self) -> list[Row]:
        """The grid against kvpress, in turn."""
        new, tokens, prompts = self.cfg.new_tokens, self.cfg.grid_tokens, self.cfg.grid_prompts
        jobs = [Job(self.request(self.prompt(tokens, i), new), [c.variant for c in self.cells]) for i in range(prompts)]
        budgets = [int(b) for b in self.cfg.budgets]
        with self.peer() as peer:
            ours = lambda: timed(lambda: self.run(jobs, self.cfg.max_lanes)) / prompts  # noqa: E731
            return compare(peer, ours, list(jobs[0].request.ids), budgets, new, self.cfg.repeats)

    def overlap(self) -> list[Row]:
        """Positions that methods keep here and in kvpress, of real prompts."""
        if self.loaded.dtype != torch.float32:
            raise InputError(f"model.dtype={str(self.loaded.dtype)[6:]}: kvpress computes in float32; valid: float32")
        texts = prompts(self.loaded, self.cfg.overlap_tokens, self.cfg.longbench_dir)
        with self.peer() as peer:
            return overlap_rows(peer, self.loaded, texts, self.cfg.overlap_budgets, self.cfg.max_lanes)

    @contextmanager
    def peer(self) -> Iterator[Peer]:
        """kvpress with this model's weights."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            with closing(Peer(self.cfg.peer_python, folder)) as peer:
                yield peer

    def bytes(self) -> list[Row]:
        """Cache bytes read off the storages, and what 2 x layers x heads x entries x dimension x size gives."""
        entry = self.entry_bytes()
        tokens = self.cfg.prompt_tokens[-1]
        request = self.request(self.prompt(tokens), self.cfg.new_tokens)
        rows = []
        for cell in self.cells:
            if cell.variant.policy.own_pool:
                continue  # keys of another size, or two pools: the tests of HCAttention and SCOPE count them
            result = self.run([Job(request, [cell.variant])], 1)[0]
            expected = entry * min(tokens, cell.variant.cell(tokens).budget)
            rows.append(
                {
                    "part": "bytes",
                    "what": cell.shown,
                    "budget": cell.budget,
                    "prompt_tokens": tokens,
                    "kv_bytes": result.kv_bytes,
                    "formula": expected,
                    "kv_bytes_peak": result.kv_bytes_peak,
                    "bookkeeping_bytes": result.bookkeeping_bytes,
                }
            )
        return rows

    def entry_bytes(self) -> int:
        """Of one cached token in all layers and KV heads: key and value."""
        shape = shape_of(self.loaded)
        return 2 * shape.layers * shape.kv_heads * shape.head_dim * self.loaded.dtype.itemsize

    def peak(self) -> list[Row]:
        """Peak memory of a sweep of all budgeted cells at a quarter, half and all of their budgets.

        What torch had allocated at once: CUDA's own count, on a CPU the profiler's. Beside it what the sweep has to
        hold: the cells' entries, and one layer's keys and values of the whole prompt.
        """
        tokens, new = self.cfg.prompt_tokens[-1], self.cfg.new_tokens
        ids, entry = self.prompt(tokens), self.entry_bytes()
        plain = self.allocated(lambda: self.plain.prefill(ids), self.plain.memory)
        rows = []
        for share in (0.25, 0.5, 1.0):
            variants = [
                Variant(c.variant.policy, max(round(share * c.budget), c.variant.policy.least_budget()))
                for c in self.cells
                if isinstance(c.budget, int)
            ]
            engine, job = Engine(self.model, self.cfg.max_lanes), Job(self.request(ids, new), variants)
            entries = sum(v.cell(tokens).budget for v in variants)
            rows.append(
                {
                    "part": "peak",
                    "what": f"{share:g} x budgets",
                    "cells": len(variants),
                    "prompt_tokens": tokens,
                    "cache_bytes": entries * entry,
                    "one_layer_bytes": tokens * entry // shape_of(self.loaded).layers,
                    "plain_prefill_peak": plain,
                    "sweep_peak": self.allocated(partial(self.drain, engine, job), engine.memory),
                }
            )
        return rows

    def drain(self, engine: Engine, job: Job) -> None:
        list(engine.run([job]))

    def allocated(self, call: Callable[[], object], memory: MemoryMeter) -> int:
        """Peak bytes allocated during a call, the weights left out."""
        if self.model.device.type != "cuda":
            return allocated_peak(call)
        before = torch.cuda.memory_allocated(self.model.device)
        call()
        return max(memory.peaks.values()) - before

    def interleave(self, runs: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Every run once as a warm-up, then all in turn, `repeats` times."""
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.cfg.repeats + 1):
            for name, run in runs.items():
                taken = run()
                if turn:
                    seconds[name].append(taken)
                print(f"  {visible(name)}: {taken:.3f} s{'' if turn else ' (warm-up)'}", file=sys.stderr, flush=True)
        return seconds


def shown_name(cell: CellConfig | None) -> str:
    return "plain" if cell is None else cell.shown


def one_budget(cells: Sequence[CellConfig]) -> list[CellConfig]:
    """Of every policy the cell with the largest budget."""
    largest: dict[str, CellConfig] = {}
    for cell in cells:
        if cell.shown not in largest or (cell.budget or 0) > (largest[cell.shown].budget or 0):
            largest[cell.shown] = cell
    return list(largest.values())


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
