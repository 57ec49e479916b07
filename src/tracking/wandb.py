"""Weights & Biases behind one small interface. It never asks, never hangs, never fails a run.

The files in a run's folder are the record; W&B gets a copy. Whatever goes wrong here is one warning, and the
run goes on. Before a run is opened online the server is asked for a sign of life, because once an online
start has failed, an offline start in the same process may time out as well (wandb issue 9865).
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.files import write_whole
from src.records.record import Record
from src.tracking.server import key_configured, one_line, server, server_answers, within

MODES = ("auto", "online", "offline", "disabled")
VALID_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
RUN_ID = "wandb_id"  # file in a run's folder, so that a resumed run goes on in the same W&B run
TABLE: dict[str, Callable[[Record], Any]] = {
    "task": lambda record: record.task,
    "id": lambda record: record.id,
    "score": lambda record: record.score,
    "prediction": lambda record: record.prediction,
    "scored": lambda record: record.scored,
    "answers": lambda record: record.answers,
    "prompt_tokens": lambda record: record.prompt_tokens,
    "new_tokens": lambda record: record.new_tokens,
    "kv_bytes": lambda record: record.kv_bytes,
    "seconds": lambda record: record.seconds,
    "error": lambda record: record.error,
}

# Host name, command line, script and interpreter stay out of W&B's files: wandb looks them up where nothing is said,
# so something is said. `x_disable_meta` keeps back what its service process would find out by itself.
UNNAMED: dict[str, Any] = {
    "host": "not-recorded",
    "program": "not-recorded",
    "program_abspath": "not-recorded",
    "program_relpath": "not-recorded",
    "x_executable": "not-recorded",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "disable_job_creation": True,
}

log = logging.getLogger(__name__)


class Tracker(ABC):
    """What a run tells the outside world. Made by `Tracking.start`, ended by `finish`."""

    @abstractmethod
    def log_sample(self, record: Record) -> None:
        """One finished sample."""

    @abstractmethod
    def finish(self, metrics: Mapping[str, Any], records: Sequence[Record]) -> None:
        """The run's end: final figures, predictions, retention. Nothing may be logged after it."""


class NoTracker(Tracker):
    """Tracks nothing."""

    def log_sample(self, record: Record) -> None:
        pass

    def finish(self, metrics: Mapping[str, Any], records: Sequence[Record]) -> None:
        pass


class Tracking:
    """How this process tracks: made once, so that a server is tried, and complained about, only once."""

    def __init__(
        self,
        mode: str = "auto",
        *,
        project: str = "kv-eviction-bench",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        init_timeout: float = 15,
        finish_timeout: float = 60,
        table_rows: int = 1000,
        identify: bool = False,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"wandb.mode={mode}: valid are {', '.join(MODES)}")
        self.mode = mode
        self.init_timeout, self.finish_timeout, self.table_rows = init_timeout, finish_timeout, table_rows
        self.identify = identify
        self._where: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "tags": list(tags),
        }
        self._settled = False

    def start(
        self, folder: Path, config: Mapping[str, Any], name: str, group: str | None = None, done: int = 0
    ) -> Tracker:
        """Open a run, its W&B files in `folder`; `done` samples were there before. Several may be open."""
        try:
            self._settle()
            if self.mode == "online":
                run, why = self._init(folder, config, name, group)
                if run is not None:
                    return WandbTracker(run, folder, self, done)
                self._offline(f"{server()} opened no run ({why})")
                within(10, _teardown)
            if self.mode == "offline":
                run, why = self._init(folder, config, name, group)
                if run is not None:
                    return WandbTracker(run, folder, self, done)
                log.warning("W&B did not start (%s): this run is in its results folder only", why)
        except Exception as error:
            log.warning("W&B is off for this run: %s", one_line(error))
        return NoTracker()

    def _settle(self) -> None:
        """Decide once between online, offline and disabled."""
        if self._settled:
            return
        self._settled = True
        if self.mode == "auto":
            wished = {"dryrun": "offline", "run": "online"}.get(wish := os.environ.get("WANDB_MODE", ""), wish)
            self.mode = wished if wished in MODES[1:] else "online" if key_configured() else "offline"
        if self.mode != "online":
            return
        if not key_configured():
            self._offline("no API key is configured (`wandb login` stores one)")
        elif not server_answers(server(), min(self.init_timeout, 8)):
            self._offline(f"{server()} does not answer")

    def _offline(self, reason: str) -> None:
        log.warning("W&B: %s; going on offline, `wandb sync` uploads the run later", reason)
        self.mode = "offline"

    def _init(self, folder: Path, config: Mapping[str, Any], name: str, group: str | None) -> tuple[Any, str]:
        """A wandb run, or None and why it did not start."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports would print errors of their own
        import wandb

        logging.raiseExceptions = (
            False  # wandb's log lies in the run's folder: a full disk there is no traceback of ours
        )
        settings = wandb.Settings(
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            x_service_wait=self.init_timeout,
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            **({} if self.identify else UNNAMED),
        )
        where = {**self._where, "group": group or self._where["group"]}
        mode: Any = self.mode

        def init() -> Any:
            return wandb.init(
                dir=str(folder),
                name=name,
                config=dict(config),
                id=_run_id(folder),
                resume="allow" if self.mode == "online" else None,
                mode=mode,
                reinit="create_new",
                settings=settings,
                **where,
            )

        done, result = within(self.init_timeout + 5, init)
        if not done:
            return None, f"nothing within {self.init_timeout + 5:g} s"
        if isinstance(result, BaseException):
            return None, one_line(result)
        if self.mode == "online":
            log.info("W&B: %s", result.url)
        return result, ""


class WandbTracker(Tracker):
    """One W&B run. The first failure is reported, then the run goes untracked."""

    def __init__(self, run: Any, folder: Path, tracking: Tracking, done: int) -> None:
        self._run, self._folder, self._tracking = run, folder, tracking
        self._samples = done
        self._broken = False
        self._attempt(lambda: run.define_metric("*", step_metric="samples"))

    def log_sample(self, record: Record) -> None:
        self._samples += 1
        found = {
            "score": record.score,
            "seconds": record.seconds,
            "kv_bytes": record.kv_bytes,
            "prompt_tokens": record.prompt_tokens,
            "new_tokens": record.new_tokens,
            f"{record.task}/score": record.score,
        }
        values = {f"sample/{name}": value for name, value in found.items() if value is not None}
        self._attempt(lambda: self._run.log({"samples": self._samples, **values}))

    def finish(self, metrics: Mapping[str, Any], records: Sequence[Record]) -> None:
        self._attempt(lambda: self._log_end(metrics, records))
        code = int(bool(metrics.get("failed")))
        done, result = within(self._tracking.finish_timeout + 10, lambda: self._run.finish(code))
        if not done or isinstance(result, BaseException):
            log.warning("W&B did not finish its upload; `wandb sync %s/wandb/*run*` does it later", self._folder)

    def _log_end(self, metrics: Mapping[str, Any], records: Sequence[Record]) -> None:
        import numpy as np
        import wandb

        self._run.summary.update(summary(metrics))
        last: dict[str, Any] = {"samples": self._samples, "predictions": self._table(records)}
        retention = metrics.get("retention") or {}
        if retention.get("histogram"):
            edges = np.linspace(0, 1, len(retention["histogram"]) + 1)
            kept = np.asarray(retention["histogram"]) * retention["kept_mean"]  # entries of a mean layer and head
            last["retention/positions"] = wandb.Histogram(np_histogram=(kept, edges))
        if retention.get("chosen"):
            shares = np.asarray(retention["chosen"]["histogram"])
            edges = np.linspace(0, 1, len(shares) + 1)
            last["retention/chosen"] = wandb.Histogram(np_histogram=(shares * retention["chosen"]["samples"], edges))
        picture = self._folder / "retention.png"
        if picture.exists():
            last["retention/layers"] = wandb.Image(str(picture))
        self._run.log(last)

    def _table(self, records: Sequence[Record]) -> Any:
        import wandb

        step = max(1, -(-len(records) // max(self._tracking.table_rows, 1)))
        rows: list[Any] = [[_cell(read(record)) for read in TABLE.values()] for record in records[::step]]
        return wandb.Table(columns=list(TABLE), data=rows, allow_mixed_types=True)

    def _attempt(self, call: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            call()
        except Exception as error:
            log.warning("W&B stopped tracking this run: %s", one_line(error))
            self._broken = True


def summary(metrics: Mapping[str, Any]) -> dict[str, float]:
    """metrics.json as flat names for W&B's summary: score/<task>, memory/ratio, retention/decile_shares/00, ...

    Retention over all, per layer (retention/per_layer/gini/07) and per task; heads stay in metrics.json, there are
    thousands of them.
    """
    flat: dict[str, Any] = {name: metrics.get(name) for name in ("average", "samples", "failed")}
    for task, figures in metrics.get("tasks", {}).items():
        for name in ("score", "stderr", "n"):
            flat[f"{name}/{task}"] = figures.get(name)
        for name, value in (figures.get("extra_scores") or {}).items():
            flat[f"extra_score/{task}/{name}"] = value
    for part in ("memory", "speed", "fidelity"):
        for name, value in (metrics.get(part) or {}).items():
            flat |= _flat(f"{part}/{name}", value)
    kept = metrics.get("retention") or {}
    flat |= _flat("retention", kept)
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested figures under joined names; list entries are numbered from 00."""
    inner: dict[str, Any] = {}
    if isinstance(value, Mapping):
        inner = {str(k): item for k, item in value.items() if k != "histogram" and not str(k).endswith("per_head")}
    elif isinstance(value, list):
        inner = {f"{i:02}": item for i, item in enumerate(value)}
    else:
        return {name: value}
    return {key: item for part, each in inner.items() for key, item in _flat(f"{name}/{part}", each).items()}


def _teardown() -> None:
    import wandb

    wandb.teardown()


def _run_id(folder: Path) -> str:
    """The id that the folder holds; a new one, kept there, where it holds none or something else."""
    path = folder / RUN_ID
    if path.exists():
        found = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        if VALID_ID.fullmatch(found):
            return found
        log.warning("%s: not a W&B run id; a new one is used, and W&B shows a new run", path)
    new = uuid.uuid4().hex[:12]
    write_whole(path, f"{new}\n")
    return new


def _cell(value: Any) -> Any:
    return " | ".join(map(str, value)) if isinstance(value, list | tuple) else value
