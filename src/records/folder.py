"""A run's folder: what is written, when, and how a killed run goes on.

`predictions.jsonl` gets one line per sample as soon as the sample is done, flushed to the disk; its retention
is written just before, so that a line never lacks it. Among lines of the same task and id the last one
counts. `finish` turns everything valid in the folder, not only the present call's samples, into metrics.json,
retention.npz and retention.png.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from src.errors import InputError
from src.files import append_whole, replacing, write_whole
from src.records.files import METRICS, PREDICTIONS, SETTINGS, Table, load_records, run_path, settings_hash
from src.records.kept_files import FINISHED, JOURNAL, KeptFiles
from src.records.kinds import is_number
from src.records.lock import FolderLock
from src.records.metrics import compute_metrics
from src.records.metrics_file import earlier_metrics, write_metrics
from src.records.owner import check_settings, write_environment
from src.records.predictions import repair
from src.records.record import Record
from src.retention import store
from src.retention.from_records import chosen, needle, score_bias
from src.retention.plot import plot_retention
from src.retention.profile import Profile, profile, summarise
from src.retention.store import Kept, Key
from src.retention.trace import CHOSEN, TRACES

__all__ = ["Kept", "Key", "RunFolder", "compute_metrics", "load_records", "run_path", "settings_hash"]

log = logging.getLogger(__name__)

PICTURE = "retention.png"
WRITTEN = (
    *(PREDICTIONS, METRICS, SETTINGS, JOURNAL, "config.yaml", "environment.json"),
    *(FINISHED, PICTURE, "wandb_id"),
)
PEAKS = ("peak_bytes", "peak_prefill_bytes", "peak_decode_bytes")


class RunFolder:
    """One run's folder, held by one process at a time. Use as a context manager, or `close()` it.

    With `shared` several processes, all of them sharing, may fill it at once (jobs of a cluster launch with the
    same cells and different tasks): they take turns to write, and each `finish` counts what all have written.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        config_yaml: str = "",
        environment: Mapping[str, Any] | None = None,
        *,
        retention: str = "positions",
        overwrite: bool = False,
        shared: bool = False,
    ) -> None:
        if retention not in store.MODES:
            raise InputError(f"retention={retention}: valid are {', '.join(store.MODES)}")
        self.path = Path(path)
        self.mode = retention
        self._brought_back: set[Key] = set()  # records of earlier prompts that count again
        self._drawing: tuple[Profile, str] | None = None  # the picture's content and title
        self._lock = FolderLock(self.path, shared)
        try:
            with self._lock.turn():
                self._open(settings, config_yaml, environment, overwrite)
        except BaseException:
            self.close()
            raise

    def done(self, key: Key, fidelity: bool = False) -> bool:
        """Is this sample finished, so that it need not run again? Not if it failed, nor without fidelity if
        asked.

        Where the data changed back to an earlier prompt, that prompt's record is made the current one again; `finish`
        puts its line last.
        """
        record = self._table.records.get(key)
        if record is None or not record.succeeded or (fidelity and not record.fidelity):
            return False
        if self._table.last[key[:2]] != key:
            self._table.last[key[:2]] = key
            self._brought_back.add(key)
        return True

    def found(self, key: Key) -> Record:
        """The record of a sample that is `done`."""
        return self._table.records[key]

    def holds(self, record: Record) -> bool:
        """Is this very record one of those that count?"""
        return self._table.holds(record)

    def has_retention(self, key: Key) -> bool:
        """Is there of this sample what `retention` asks for?"""
        return self._kept.suffices(key)

    def append(self, record: Record, kept: Kept | None = None) -> None:
        """Keep one finished (or failed) sample for good. Returns once it is on the disk."""
        with self._lock.turn():
            if kept is not None and self.mode != "off":
                self._kept.append(store.kept_sample(record.key, record.cut, kept, self.mode))
            append_whole(self.path / PREDICTIONS, record.line())
            self._table.add(record)

    @property
    def records(self) -> list[Record]:
        """The records that count (one per task and id), sorted."""
        return self._table.current()

    def finish(
        self,
        *,
        policy: str,
        model: str,
        budget: float | int | None,
        comparability: Mapping[str, Any] | None = None,
        task_metrics: Mapping[str, str] | None = None,
        peaks: Mapping[str, float | None] | None = None,
        recent: int | None = None,
        plot: bool = True,
        asked: Collection[tuple[str, str]] = (),
        reconstruction: str = "",
    ) -> dict[str, Any]:
        """Write retention.npz, metrics.json and (last) retention.png over all current records; return the metrics.

        A disk too full for retention.npz costs no metrics: the journal still holds what it says. `plot=False` leaves
        the picture to `draw`.

        `asked`: task and id of the samples that this call was to run. Those that are not there, of this call or of
        earlier ones, are listed as `missing`: the run was interrupted.

        Raises:
            InputError: retention.npz or metrics.json cannot be written.
        """
        with self._lock.turn():
            again = {key for key in self._brought_back if self._table.last[key[:2]] == key}
            if self._lock.shared:
                self._read()
            self._table.last |= {key[:2]: key for key in again}
            if again or self._table.long:
                self._rewrite()
            keys = [record.key for record in self.records if record.succeeded and record.key in self._kept]
            refused = None
            try:
                if self._kept.finish(keys):
                    (self.path / PICTURE).unlink(missing_ok=True)
            except InputError as error:  # metrics.json is smaller and worth more
                refused = error
            data = profile(self._kept.read(keys), recent)
            before = earlier_metrics(self.path / METRICS)
            metrics = compute_metrics(
                self.records,
                policy=policy,
                model=model,
                budget=budget,
                comparability=self._with_earlier_versions(comparability or {}, before),
                task_metrics=task_metrics,
                peaks=_peaks_so_far(peaks or {}, before),
                retention=self._measured(keys, data),
            )
            wanted = {*asked, *((task, id_) for task, id_ in before.get("missing", ()))}
            metrics["missing"] = sorted(list(sample) for sample in wanted if sample not in self._table.last)
            if reconstruction:  # `Policy.reconstruction`: a report must say so beside the figures
                metrics["reconstruction"] = reconstruction
            metrics["settings_hash"] = self._settings_hash
            written = write_metrics(self.path / METRICS, metrics)
            if refused:
                raise refused
            self._drawing = (data, f"{policy}, {model}, budget {budget}") if keys else None
        if plot:
            self.draw()
        return written

    def draw(self) -> None:
        """retention.png, if it is not there, after `finish`. A run is worth more than its picture: whatever is against
        it is a warning, and the next call tries again."""
        picture = self.path / PICTURE
        if self._drawing is None or picture.exists():
            return
        try:
            with self._lock.turn(), replacing(picture) as part:
                plot_retention(self._drawing[0], part, self._drawing[1])
        except Exception as error:
            log.warning("not drawn, the next call tries again: %s", " ".join(f"{error}".split()) or repr(error))

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- opening ---

    def _open(
        self, settings: Mapping[str, Any], config: str, environment: Mapping[str, Any] | None, overwrite: bool
    ) -> None:
        if overwrite:
            for name in WRITTEN:
                (self.path / name).unlink(missing_ok=True)
                (self.path / f"{name}.part").unlink(missing_ok=True)
            for name in (TRACES, CHOSEN):
                shutil.rmtree(self.path / name, ignore_errors=True)
        self._settings_hash = settings_hash(settings)
        check_settings(self.path, settings)
        if config:
            write_whole(self.path / "config.yaml", config)
        if environment is not None:
            write_environment(self.path, environment)
        self._read()

    def _read(self) -> None:
        """What the folder holds: predictions, and kept positions in the journal and in the finished file."""
        self._table = Table()
        for record in repair(self.path / PREDICTIONS):
            self._table.add(record)
        self._kept = KeptFiles(self.path, self.mode)

    # --- writing ---

    def _rewrite(self) -> None:
        """predictions.jsonl with one line of each key: a folder in which samples run again does not grow for ever."""
        with replacing(self.path / PREDICTIONS) as part, part.open("wb") as file:
            file.writelines(record.line() for record in self._table.all())
        self._table.lines = Counter(self._table.records.keys())
        self._brought_back.clear()

    def _measured(self, keys: Sequence[Key], data: Profile) -> dict[str, Any]:
        """The `retention` part of metrics.json."""
        if not keys:
            return {}
        records = self.records
        return summarise(data) | needle(self._kept.read(keys), records) | score_bias(records) | chosen(records)

    def _with_earlier_versions(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """`task_versions` names all tasks in the folder, also those of earlier calls and of other jobs."""
        versions = before.get("comparability", {}).get("task_versions")
        if not isinstance(versions, Mapping):
            versions = {}
        present = {record.task for record in self.records}
        kept = {task: version for task, version in versions.items() if task in present}
        both = {**kept, **now.get("task_versions", {})}
        return {**now, "task_versions": dict(sorted(both.items()))} if both else dict(now)


def _peaks_so_far(peaks: Mapping[str, float | None], before: Mapping[str, Any]) -> dict[str, float | None]:
    """Peaks are per process; a resumed run's count is the largest of its parts."""
    parts: list[Mapping[str, Any]] = [peaks, before.get("memory", {})]
    both = {name: [part[name] for part in parts if is_number(part.get(name))] for name in PEAKS}
    return {name: max(values) if values else None for name, values in both.items()}
