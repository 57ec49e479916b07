"""One pass over the samples for one or many cells: what `src.run` and `src.sweep` have in common.

samples -> prompts -> which cells still lack them -> engine -> one record per cell -> folders, tracking
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evals.metrics import extra_scores, score_sample
from evals.prompts import Prompt, encode
from evals.tasks import Sample, load_samples
from src.cluster import distributed
from src.engine import Engine
from src.environment import environment
from src.errors import InputError
from src.jobs import Generation, Job, Request
from src.models import LoadedModel, load_model
from src.progress import Progress
from src.records import Kept, RunFolder, run_path
from src.settings import CellConfig
from src.tracking import Tracker, Tracking

log = logging.getLogger(__name__)

SCOPES = ("whole", "context")


@lru_cache(maxsize=1)
def loaded(model: str) -> LoadedModel:
    """The model of a config given as JSON; kept for the next job of the same process (`-m`)."""
    return load_model(json.loads(model))


@dataclass
class Cell:
    """One cell's folder and tracker while a session runs."""

    config: CellConfig
    folder: RunFolder
    tracker: Tracker


@dataclass(frozen=True)
class Task:
    """A sample with its prompt, as the engine will see it."""

    sample: Sample
    prompt: Prompt
    ids: list[int]
    key: tuple[str, str, str]


class Session:
    """Runs cells over the samples that a config names, and finishes their folders.

    Args:
        cfg: a composed run or sweep config.
        cells: policies and budgets.
        lanes: the most lanes decoded together.

    Raises:
        InputError, DataError: anything that is wrong with the settings or the data, before anything runs.
    """

    def __init__(self, cfg: DictConfig, cells: Sequence[CellConfig], lanes: int) -> None:
        self.cfg = cfg
        if cfg.prompt_scope not in SCOPES:
            raise InputError(f"prompt_scope={cfg.prompt_scope}: valid: {', '.join(SCOPES)}")
        if lanes < 1:
            raise InputError(f"lanes={lanes}: valid: 1 or more")
        if cfg.overwrite and distributed():
            raise InputError(
                "overwrite=true: jobs of a cluster may share a results folder and would delete each other's; "
                "valid: false, or move the old results away"
            )
        tasks = OmegaConf.to_container(cfg.tasks, resolve=True)
        assert isinstance(tasks, dict)
        options = {str(k): v for k, v in tasks.items() if k not in ("suite", "names", "data_dir")}
        self.samples = load_samples(tasks["suite"], tasks["names"], cfg.limit, tasks["data_dir"], cfg.seed, **options)
        if cfg.fidelity:
            refuse_missing_references(self.samples)
        self.model = loaded(json.dumps(OmegaConf.to_container(cfg.model, resolve=True), sort_keys=True))
        self.engine = Engine(self.model.model, lanes)
        self.interrupted = False
        self.failed = 0
        tracking = Tracking(**cfg.wandb)
        self.cells = [self._open(cell, tracking) for cell in cells]

    def run(self) -> int:
        """All samples that any cell lacks; returns the exit code: 0, 1 (samples failed), 130 (interrupted)."""
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with Progress([c.config for c in self.cells], total=len(self.samples)) as progress:
                self._run(progress)
        finally:
            signal.signal(signal.SIGINT, before)
            for cell in self.cells:
                self._close(cell)
        if self.interrupted:
            print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
            return 130
        if self.failed:
            print(f"{self.failed} samples failed; their reasons are in predictions.jsonl (`error`)", file=sys.stderr)
        return 1 if self.failed else 0

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C finishes the samples in flight; the second stops at once."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("stopping after the samples in flight (Ctrl-C again: at once)", file=sys.stderr)

    def _run(self, progress: Progress) -> None:
        by_variant = {id(cell.config.variant): cell for cell in self.cells}
        tasks: dict[str, Task] = {}

        def jobs() -> Iterator[Job]:
            for sample in self.samples:
                if self.interrupted:
                    return
                task = self._task(sample)
                missing = [c for c in self.cells if not c.folder.done(task.key, self.cfg.fidelity)]
                for cell in self.cells:
                    if cell not in missing:
                        progress.skip(cell.config)
                if missing:
                    request = self._request(task)
                    tasks[request.name] = task
                    yield Job(request, [c.config.variant for c in missing])

        for result in self.engine.run(jobs()):
            cell = by_variant[id(result.variant)]
            record = self._record(tasks[result.request.name], result)
            kept = None if result.error else Kept(result.kept_prompt, result.kept_end)
            cell.folder.append(record, kept)
            cell.tracker.log_sample(record)
            progress.done(cell.config, record)
            self.failed += bool(record["error"])

    def _open(self, cell: CellConfig, tracking: Tracking) -> Cell:
        settings = self._settings(cell)
        path = run_path(self.cfg.output_root, self.model.name, cell.label, budget_name(cell), settings)
        grid = ("policies", "budgets", "max_lanes")  # a cell's config does not depend on the grid it was part of
        config = {k: v for k, v in self.cfg.items() if k not in grid}
        config |= {"policy": cell.settings, "budget": cell.budget}
        folder = RunFolder(
            path,
            settings,
            OmegaConf.to_yaml(OmegaConf.create(config), resolve=True),
            environment(str(self.model.device)),
            retention=self.cfg.retention,
            overwrite=self.cfg.overwrite,
            shared=distributed(),
        )
        flat = {"settings": settings, "tasks": OmegaConf.to_container(self.cfg.tasks, resolve=True)}
        name = f"{self.model.name} {cell.label} {budget_name(cell)}"
        return Cell(cell, folder, tracking.start(path, flat, name, done=len(folder.records)))

    def _settings(self, cell: CellConfig) -> dict[str, Any]:
        """Every setting that changes a sample's outcome; `tasks` and `limit` only choose samples."""
        cfg, model = self.cfg, self.model
        return {
            "policy": cell.settings,
            "budget": cell.budget,
            "model": {
                "name": model.name,
                "source": model.source,
                "dtype": str(model.dtype).removeprefix("torch."),
                "chat": model.chat,
                "chat_template": cfg.model.chat_template,
                "template_kwargs": dict(model.template_kwargs),
                "stop_ids": sorted(model.stop_ids),
                "max_prompt_tokens": model.max_prompt_tokens,
            },
            "seed": cfg.seed,
            "prompt_scope": cfg.prompt_scope,
            "max_new_tokens": cfg.max_new_tokens,
            "edit_similarity": cfg.edit_similarity,
        }

    def _comparability(self) -> dict[str, Any]:
        return {
            "max_prompt_tokens": self.model.max_prompt_tokens,
            "chat_template": self.model.chat,
            "rouge": "rouge 1.0.1",
            "edit_similarity": self.cfg.edit_similarity,
            "prompt_scope": self.cfg.prompt_scope,
            "max_new_tokens": self.cfg.max_new_tokens,
            "random_weights": self.model.random_weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "task_versions": {s.task.name: s.task.version for s in self.samples},
        }

    def _close(self, cell: Cell) -> None:
        memory = self.engine.memory
        peaks = {
            "peak_bytes": max(memory.peaks.values(), default=memory.process_peak()),
            "peak_prefill_bytes": memory.peaks.get("prefill"),
            "peak_decode_bytes": memory.peaks.get("decode"),
        }
        metrics = cell.folder.finish(
            policy=cell.config.label,
            model=self.model.name,
            budget=cell.config.budget,
            comparability=self._comparability(),
            task_metrics={s.task.name: s.task.metric for s in self.samples},
            peaks=peaks,
        )
        cell.tracker.finish(metrics, cell.folder.records)
        cell.folder.close()

    def _task(self, sample: Sample) -> Task:
        prompt = encode(
            sample,
            self.model.tokenizer,
            self.model.max_prompt_tokens,
            self.model.chat,
            self.model.template_kwargs,
        )
        ids = self.model.fit_ids(prompt.ids)
        digest = hashlib.sha256(json.dumps([ids, prompt.context_tokens]).encode()).hexdigest()[:16]
        return Task(sample, prompt, ids, (sample.task.name, sample.id, digest))

    def _request(self, task: Task) -> Request:
        sample, prompt = task.sample, task.prompt
        stop = self.model.stop_ids | (self.model.newline_ids() if sample.task.stop_at_newline else frozenset())
        cut = self.cfg.prompt_scope == "context" and 0 < prompt.context_tokens < len(task.ids)
        longest = self.cfg.max_new_tokens or sample.task.max_new_tokens
        return Request(
            name=f"{sample.task.name}/{sample.id}/{task.key[2]}",
            ids=task.ids,
            stop_ids=stop,
            max_new_tokens=longest,
            min_new_tokens=min(sample.task.min_new_tokens, longest),
            context_tokens=prompt.context_tokens if cut else None,
            reference=self._reference(task, longest) if self.cfg.fidelity else None,
        )

    def _reference(self, task: Task, longest: int) -> list[int]:
        """The first reference answer as the model would write it, with its end token."""
        glued = not task.prompt.chat and not task.sample.prompt[-1:].isspace()
        answer = (" " if glued else "") + task.sample.answers[0]
        ids = self.model.tokenizer.encode(answer, add_special_tokens=False)[: longest - 1]
        return self.model.fit_ids([*ids, self.model.tokenizer.eos_token_id])

    def _record(self, task: Task, result: Generation) -> dict[str, Any]:
        sample = task.sample
        record: dict[str, Any] = {
            "task": sample.task.name,
            "metric": sample.task.metric,
            "id": sample.id,
            "prompt_hash": task.key[2],
            "prompt_tokens": len(task.ids),
            "truncated": task.prompt.truncated,
            "answers": list(sample.answers),
            "all_classes": list(sample.all_classes) if sample.all_classes else None,
            "length": sample.length,
            "error": result.error,
        }
        if result.error:
            return {**record, "prediction": "", "new_tokens": 0, "score": None}
        prediction = str(self.model.tokenizer.decode(result.tokens, skip_special_tokens=True))
        score = score_sample(sample.task, prediction, sample.answers, sample.all_classes, self.cfg.edit_similarity)
        return {
            **record,
            "prediction": prediction,
            "new_tokens": len(result.tokens),
            "finish": result.finish,
            "score": score,
            "extra_scores": extra_scores(sample.task, prediction, sample.answers),
            "kept": {"prompt": entries(result.kept_prompt), "end": entries(result.kept_end)},
            "kv_bytes": result.kv_bytes,
            "kv_bytes_peak": result.kv_bytes_peak,
            "kv_bytes_full": result.kv_bytes_full,
            "bookkeeping_bytes": result.bookkeeping_bytes,
            "seconds": result.prefill_seconds + result.decode_seconds,
            "prefill_seconds": result.prefill_seconds,
            "decode_seconds": result.decode_seconds,
            "lanes": result.lanes,
            "fidelity": result.fidelity,
        }


def entries(kept: Sequence[Any]) -> int | list[int]:
    """Entries per KV head: one number when all layers hold equally many."""
    counts = [int(layer.shape[-1]) for layer in kept]
    return counts[0] if len(set(counts)) == 1 else counts


def budget_name(cell: CellConfig) -> int | float | str:
    return "all" if cell.budget is None else cell.budget


def refuse_missing_references(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if not any(answer.strip() for answer in sample.answers[:1]):
            raise InputError(
                f"fidelity=true: task {sample.task.name}, sample {sample.id} has no reference answer; "
                "valid: fidelity=false, or tasks with answers"
            )


def show_results(cells: Sequence[Cell]) -> None:
    """The last line on stdout: the run's folder, or the folder that holds all cells' folders."""
    path = cells[0].folder.path
    print(f"results: {path if len(cells) == 1 else path.parent}")
