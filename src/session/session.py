"""One pass over the samples for one or many cells: what `src.run` and `src.sweep` have in common.

samples -> prompts -> which cells still lack them -> engine -> one record per cell -> folders, tracking
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from evals.suites import load_samples
from evals.tasks import Sample
from evals.visible import visible
from src.config.binding import bind
from src.config.cells import CellConfig
from src.config.cluster import distributed
from src.config.settings import SessionSettings
from src.engine.engine import Engine
from src.engine.layer_kinds import TextLengths, check_lengths
from src.engine.request import Generation, Job
from src.errors import InputError
from src.records.earlier import begun_anew
from src.records.environment import environment
from src.records.files import run_path
from src.records.folder import RunFolder
from src.records.record import Record
from src.retention.store import Kept
from src.retention.trace import made_with, trace_path
from src.session.chosen import has_chosen, save_chosen
from src.session.comparability import comparability, outcome_settings
from src.session.interrupt import Interrupt
from src.session.model import current
from src.session.progress import Progress
from src.session.samples import Prepared, malformed_record, prepare, refuse_missing_references, to_record, to_request
from src.session.tally import Tally
from src.session.trace_probe import TraceProbe
from src.tracking.wandb import Tracker, Tracking

log = logging.getLogger(__name__)


@dataclass(eq=False)
class OpenCell:
    """One cell's folder and tracker while a session runs."""

    config: CellConfig
    folder: RunFolder
    tracker: Tracker


class Session:
    """Runs cells over the samples that a config names, and finishes their folders.

    Args:
        cfg: a run's or a sweep's.
        cells: policies and budgets.
        lanes: the most lanes decoded together.

    Raises:
        InputError, DataError: anything that is wrong with the settings or the data, before anything runs.
    """

    def __init__(self, cfg: SessionSettings, cells: Sequence[CellConfig], lanes: int) -> None:
        self.cfg = cfg
        if cfg.overwrite and distributed():
            raise InputError(
                "overwrite=true: jobs of a cluster may share a results folder and would delete each other's; "
                "valid: false, or move the old results away"
            )
        for cell in cells:
            sequel = cell.variant.policy.sequel
            if sequel and sequel.answer == "reference" and not cfg.fidelity:
                raise InputError(f"policy={cell.shown}: looks at the reference answer; valid with fidelity=true only")
        self.samples = self._samples()
        tracking = Tracking(**asdict(cfg.wandb))
        self.model = current(json.dumps(asdict(cfg.model), sort_keys=True))
        self.beyond_context = self._check_lengths()
        self.tracing = TraceProbe(cfg.kept_over_time) if cfg.kept_over_time else None
        self.engine = Engine(self.model.model, lanes, probes=[self.tracing] if self.tracing else [])
        self.interrupt, self.tally = Interrupt(), Tally(cfg.retention)
        folders: list[tuple[CellConfig, RunFolder]] = []
        self.anew: list[str] = []  # why folders begin anew
        with ExitStack() as opened:  # if the last cell's folder is refused, the others' are free again
            for cell in bind(cells, self.model):
                folders.append((cell, self._open(cell)))
                opened.callback(folders[-1][1].close)
            opened.pop_all()
        if self.anew:
            more = f" (and {len(self.anew) - 1} more)" if self.anew[1:] else ""
            log.warning("%s%s", self.anew[0], more)
        self.cells = [OpenCell(cell, folder, self._track(cell, folder, tracking)) for cell, folder in folders]

    def _check_lengths(self) -> bool:
        """Whether prompts and new tokens together may go beyond the positions the model was made for: warned of.

        Raises:
            InputError: they may be longer than the model can serve at all.
        """
        model = self.model
        new = max((self.cfg.max_new_tokens or s.task.max_new_tokens for s in self.samples if not s.error), default=0)
        check_lengths(TextLengths.of(model.model).limits, model.max_prompt_tokens, new)
        longest = model.max_prompt_tokens + new
        if longest <= model.context_length:
            return False
        log.warning(
            "model.max_prompt_tokens=%d and %d new tokens may reach %d positions, the model was made for %d; "
            "records of longer texts say so (beyond_context)",
            model.max_prompt_tokens, new, longest, model.context_length,
        )  # fmt: skip
        return True

    def run(self) -> int:
        """All samples that any cell lacks; returns the exit code: 0, 1 (samples failed), 130 (interrupted).

        Raises:
            KeyboardInterrupt: at the second Ctrl-C. Every record written so far stays.
        """
        progress = Progress([c.config for c in self.cells], total=len(self.samples))
        at_once = False
        try:
            with self.interrupt.heeded(), progress:
                self._run(progress)
        except KeyboardInterrupt:
            at_once = True
            raise
        finally:
            refused = self._close_all(without=at_once)
            if self.interrupt.asked:
                print(f"interrupted: {progress.finished} of {progress.total} done; {self._again()}", file=sys.stderr)
        self.tally.say_what_ran_again()
        if refused and not isinstance(refused[0], InputError):
            raise refused[0]
        if refused:
            more = f"; and {len(refused) - 1} more cells could not be finished" if refused[1:] else ""
            raise InputError(f"{refused[0]}{more}; {self._again()}") from None
        self.tally.say_what_failed()
        if self.interrupt.asked:
            return 130
        return 1 if self.tally.failed else 0

    def _again(self) -> str:
        command = "the same command without overwrite=true" if self.cfg.overwrite else "the same command"
        return f"{command} goes on where this one stopped"

    def _samples(self) -> list[Sample]:
        cfg, tasks = self.cfg, self.cfg.tasks
        samples = load_samples(
            tasks.suite, tasks.names, cfg.limit, tasks.data_dir, cfg.seed, cfg.broken_rows, **tasks.options
        )
        if cfg.fidelity:
            refuse_missing_references(samples)
        return samples

    def _run(self, progress: Progress) -> None:
        by_variant = {cell.config.variant: cell for cell in self.cells}
        prepared: dict[str, Prepared] = {}  # until the last cell that lacks it is done
        open_cells: Counter[str] = Counter()

        def jobs() -> Iterator[Job]:
            for sample in self.samples:
                if self.interrupt.asked:
                    return
                if sample.error:
                    for cell in self.cells:
                        self._keep(cell, malformed_record(sample), None, progress)
                    continue
                one = prepare(sample, self.model)
                missing = [c for c in self.cells if not self._done(c, one)]
                for cell in self.cells:
                    if cell not in missing:
                        progress.skip(cell.config)
                if missing:
                    request = to_request(one, self.model, self.cfg)
                    if reason := self.engine.refusal(request):
                        for cell in missing:
                            failed = Generation(request, cell.config.variant, error=reason)
                            self._keep(cell, to_record(one, failed, self.model, self.cfg), None, progress)
                        continue
                    prepared[request.name] = one
                    open_cells[request.name] = len(missing)
                    yield Job(request, [c.config.variant for c in missing])

        files = self.model.files if self.model.device.type == "cpu" else None  # elsewhere the weights are a copy
        for result in self.engine.run(jobs(), stop=lambda: self.interrupt.asked):
            if files:
                files.refuse(files.overwritten())
            cell = by_variant[result.variant]
            record = to_record(prepared[result.request.name], result, self.model, self.cfg)
            kept = None if result.error else Kept(result.kept_prompt, result.kept_end)
            trace = self.tracing.take(result) if self.tracing else None
            if trace and not result.error:
                trace.save(trace_path(cell.folder.path, record.task, record.id))
            if self.cfg.retention == "positions" and not result.error:
                save_chosen(cell.folder.path, record.task, record.id, result, record.cut)
            self._keep(cell, record, kept, progress)
            open_cells[result.request.name] -= 1
            if not open_cells[result.request.name]:
                del prepared[result.request.name], open_cells[result.request.name]

    def _done(self, cell: OpenCell, one: Prepared) -> bool:
        """Finished, with everything that this command asks for."""
        every = self.cfg.kept_over_time
        path = trace_path(cell.folder.path, one.sample.task.name, one.sample.id)
        if every and not made_with(path, every):
            return False
        if not cell.folder.done(one.key, self.cfg.fidelity):
            return False
        found = cell.folder.found(one.key)
        classes = list(one.sample.all_classes or ()) or None
        if (found.answers, found.all_classes or None) != (
            list(one.sample.answers),
            classes,
        ):  # the prompt is the same, what it is scored against is not
            self.tally.changed_answers += 1
            return False
        there = cell.folder.has_retention(one.key)
        if self.cfg.retention == "positions":
            there = there and has_chosen(cell.folder.path, found)
        self.tally.without_positions += not there
        return there

    def _keep(self, cell: OpenCell, record: Record, kept: Kept | None, progress: Progress) -> None:
        """Onto the disk, to the tracker, onto the screen."""
        if not (record.error and cell.folder.holds(record)):  # the same malformed row is written once
            cell.folder.append(record, kept)
            cell.tracker.log_sample(record)
        progress.done(cell.config, record)
        self.tally.add(cell.config.shown, record)

    def _open(self, cell: CellConfig) -> RunFolder:
        settings = outcome_settings(self.cfg, self.model, cell)
        path = run_path(self.cfg.output_root, self.model.name, cell.label, cell.budget_name, settings)
        if line := begun_anew(path, settings):
            self.anew.append(line)
        return RunFolder(
            path,
            settings,
            self.cfg.config_yaml(cell.options, cell.given),
            environment(str(self.model.device)),
            retention=self.cfg.retention,
            overwrite=self.cfg.overwrite,
            shared=distributed(),
        )

    def _track(self, cell: CellConfig, folder: RunFolder, tracking: Tracking) -> Tracker:
        config = {"settings": outcome_settings(self.cfg, self.model, cell), "tasks": self.cfg.composed["tasks"]}
        name = f"{self.model.name} {cell.label} {cell.budget_name}"
        return tracking.start(folder.path, config, name, done=len(folder.records))

    def _close_all(self, without: bool) -> list[Exception]:
        """Finish and free every folder (`without` finishing them); what is against one costs no other.

        The figures of all cells come before the first picture: a disk may have room for no more.
        """
        refused: list[Exception] = []
        finished: list[tuple[OpenCell, dict[str, Any]]] = []
        for cell in [] if without else self.cells:
            try:
                finished.append((cell, self._close(cell)))
            except Exception as error:
                refused.append(error)
        for cell, metrics in finished:
            cell.folder.draw()
            cell.tracker.finish(metrics, cell.folder.records)
        for cell in self.cells:
            cell.folder.close()
        return refused

    def _close(self, cell: OpenCell) -> dict[str, Any]:
        """metrics.json and retention.npz."""
        memory = self.engine.memory
        peaks = {
            "peak_bytes": max(memory.peaks.values(), default=memory.process_peak()),
            "peak_prefill_bytes": memory.peaks.get("prefill"),
            "peak_decode_bytes": memory.peaks.get("decode"),
        }
        versions = {s.task.name: s.task.version for s in self.samples}
        return cell.folder.finish(
            policy=cell.config.label,
            model=self.model.name,
            budget=cell.config.budget,
            comparability=comparability(self.cfg, self.model, versions, self.beyond_context),
            task_metrics={s.task.name: s.task.metric for s in self.samples},
            peaks=peaks,
            asked={(s.task.name, s.id) for s in self.samples},
            plot=False,
            reconstruction=cell.config.variant.policy.reconstructed(),
        )


def show_results(cells: Sequence[OpenCell]) -> None:
    """The last line on stdout: the run's folder, or the folder that holds all cells' folders."""
    path = cells[0].folder.path
    print(f"results: {visible(str(path if len(cells) == 1 else path.parent))}")
