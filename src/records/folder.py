"""A run's folder: what is written, when, and how a killed run goes on.

`predictions.jsonl` gets one line per sample as soon as the sample is done, flushed to the disk; its retention
is written just before, so that a line never lacks it. Among lines of the same task and id the last one
counts. `finish` turns everything valid in the folder, not only the present call's samples, into metrics.json,
retention.npz and retention.png.
"""

import fcntl
import json
import logging
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from src.errors import InputError
from src.files import append_whole, replacing, write_whole, writing
from src.records.fields import is_number
from src.records.files import PREDICTIONS, Table, canonical, differences, key_of, load_records, run_path, settings_hash
from src.records.kept_files import FINISHED, JOURNAL, KeptFiles
from src.records.metrics import compute_metrics, succeeded
from src.records.metrics_file import read_metrics, write_metrics
from src.records.predictions import encode, repair
from src.records.seal import as_json, open_sealed, read_small, sealed, why_unreadable
from src.retention import store
from src.retention.from_records import chosen, needle, score_bias
from src.retention.plot import plot_retention
from src.retention.profile import Profile, profile, summarise
from src.retention.store import Kept, Key
from src.retention.trace import CHOSEN, TRACES

__all__ = ["Kept", "Key", "RunFolder", "compute_metrics", "load_records", "run_path", "settings_hash"]

log = logging.getLogger(__name__)

METRICS, SETTINGS, PICTURE = "metrics.json", "settings.json", "retention.png"
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
        self._shared = shared
        self._brought_back: set[Key] = set()  # records of earlier prompts that count again
        self._drawing: tuple[Profile, str] | None = None  # the picture's content and title
        self._lock = self._take_lock()
        try:
            with self._turn():
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
        if record is None or not succeeded(record) or (fidelity and not record.get("fidelity")):
            return False
        if self._table.last[key[:2]] != key:
            self._table.last[key[:2]] = key
            self._brought_back.add(key)
        return True

    def found(self, key: Key) -> dict[str, Any]:
        """The record of a sample that is `done`."""
        return self._table.records[key]

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Is this very record one of those that count?"""
        return self._table.holds(record)

    def has_retention(self, key: Key) -> bool:
        """Is there of this sample what `retention` asks for?"""
        return self._kept.suffices(key)

    def append(self, record: Mapping[str, Any], kept: Kept | None = None) -> None:
        """Keep one finished (or failed) sample for good. Returns once it is on the disk."""
        key = key_of(record)
        with self._turn():
            if kept is not None and self.mode != "off":
                cut = int(record.get("context_tokens", record["prompt_tokens"]))  # tokens that the policy chose from
                self._kept.append(store.kept_sample(key, cut, kept, self.mode))
            self._write_line(dict(record))

    @property
    def records(self) -> list[dict[str, Any]]:
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
        with self._turn():
            again = {key for key in self._brought_back if self._table.last[key[:2]] == key}
            if self._shared:
                self._read()
            self._table.last |= {key[:2]: key for key in again}
            if again or self._table.long:
                self._rewrite()
            keys = [key for record in self.records if succeeded(record) and (key := key_of(record)) in self._kept]
            refused = None
            try:
                if self._kept.finish(keys):
                    (self.path / PICTURE).unlink(missing_ok=True)
            except InputError as error:  # metrics.json is smaller and worth more
                refused = error
            data = profile(self._kept.read(keys), recent)
            before = self._metrics_before()
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
            metrics = write_metrics(self.path / METRICS, metrics)
            if refused:
                raise refused
            self._drawing = (data, f"{policy}, {model}, budget {budget}") if keys else None
        if plot:
            self.draw()
        return metrics

    def draw(self) -> None:
        """retention.png, if it is not there, after `finish`. A run is worth more than its picture: whatever is against
        it is a warning, and the next call tries again."""
        picture = self.path / PICTURE
        if self._drawing is None or picture.exists():
            return
        try:
            with self._turn(), replacing(picture) as part:
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

    def _take_lock(self) -> TextIO:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise InputError(f"{self.path}: cannot write the results folder ({error.strerror})") from None
        try:
            kind = fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX
            fcntl.flock(lock, kind | fcntl.LOCK_NB)  # the system frees it when the process dies
        except BlockingIOError:
            lock.close()
            raise InputError(
                f"{self.path}: another process is writing this results folder; wait for it or stop it"
            ) from None
        except OSError as error:
            log.warning("%s: this file system cannot lock (%s); start no second run here", self.path, error.strerror)
        return lock

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Alone with the folder's files; never nested."""
        if not self._shared:
            yield
            return
        with writing(self.path / ".turn"):
            turn = (self.path / ".turn").open("w")
        with turn as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # freed when closed
            except OSError as error:
                raise InputError(
                    f"{self.path}: this file system cannot lock ({error.strerror}), so jobs cannot share it; "
                    "valid: another output_root, or cluster=local"
                ) from None
            yield

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
        self._check_settings(settings)
        if config:
            write_whole(self.path / "config.yaml", config)
        if environment is not None:
            self._write_environment(dict(environment))
        self._read()

    def _read(self) -> None:
        """What the folder holds: predictions, and kept positions in the journal and in the finished file."""
        self._table = Table()
        for record in repair(self.path / PREDICTIONS):
            self._table.add(record)
        self._kept = KeptFiles(self.path, self.mode)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path, ours = self.path / SETTINGS, canonical(settings)
        there, damaged = path.exists(), ""
        theirs: dict[str, Any] = {}
        if there:
            try:
                theirs = read_small(path)
            except (OSError, ValueError) as error:
                damaged = why_unreadable(error)
            if not damaged and canonical(theirs) == ours:
                return
        if (self.path / PREDICTIONS).exists() or there:
            if self._metrics_before().get("settings_hash") == settings_hash(settings):
                log.warning("%s: damaged; written anew, as %s says whose the folder is", path, METRICS)
            elif not there:
                raise InputError(f"{self.path}: holds predictions but no {SETTINGS}, so whose they are is unknown")
            elif damaged:
                raise InputError(f"{path}: damaged ({damaged}); run with overwrite=true to start this folder afresh")
            else:
                names = ", ".join(differences(theirs, json.loads(ours)))
                raise InputError(f"{self.path}: its results were made with other settings ({names}); move it away")
        write_whole(path, as_json(json.loads(ours), indent=2) + "\n")

    def _write_environment(self, now: dict[str, Any]) -> None:
        """The present environment; different earlier ones of the same folder are kept below it."""
        path = self.path / "environment.json"
        earlier: list[Any] = []
        if path.exists():
            try:
                before = open_sealed(read_small(path))[0]
                earlier = list(before.pop("earlier", []))
                if before != json.loads(json.dumps(now)):
                    earlier.append(before)
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s: damaged (%s); written anew", path, why_unreadable(error))
        content = {**now, **({"earlier": earlier} if earlier else {})}
        write_whole(path, json.dumps(sealed(content), indent=2) + "\n")

    # --- writing ---

    def _rewrite(self) -> None:
        """predictions.jsonl with one line of each key: a folder in which samples run again does not grow for ever."""
        with replacing(self.path / PREDICTIONS) as part, part.open("wb") as file:
            file.writelines(map(encode, self._table.all()))
        self._table.lines = Counter(self._table.records.keys())
        self._brought_back.clear()

    def _write_line(self, record: dict[str, Any]) -> None:
        append_whole(self.path / PREDICTIONS, encode(record))
        self._table.add(record)

    def _measured(self, keys: Sequence[Key], data: Profile) -> dict[str, Any]:
        """The `retention` part of metrics.json."""
        if not keys:
            return {}
        records = self.records
        return summarise(data) | needle(self._kept.read(keys), records) | score_bias(records) | chosen(records)

    def _metrics_before(self) -> dict[str, Any]:
        """metrics.json as an earlier call left it; empty if there is none, or if it is damaged."""
        path = self.path / METRICS
        if not path.exists():
            return {}
        try:
            return read_metrics(path)[0]
        except (OSError, ValueError) as error:
            log.warning(
                "%s: damaged (%s); written anew, without earlier calls' peaks and missing samples",
                path,
                why_unreadable(error),
            )
            return {}

    def _with_earlier_versions(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """`task_versions` names all tasks in the folder, also those of earlier calls and of other jobs."""
        versions = before.get("comparability", {}).get("task_versions")
        if not isinstance(versions, Mapping):
            versions = {}
        present = {record["task"] for record in self.records}
        kept = {task: version for task, version in versions.items() if task in present}
        both = {**kept, **now.get("task_versions", {})}
        return {**now, "task_versions": dict(sorted(both.items()))} if both else dict(now)


def _peaks_so_far(peaks: Mapping[str, float | None], before: Mapping[str, Any]) -> dict[str, float | None]:
    """Peaks are per process; a resumed run's count is the largest of its parts."""
    parts: list[Mapping[str, Any]] = [peaks, before.get("memory", {})]
    both = {name: [part[name] for part in parts if is_number(part.get(name))] for name in PEAKS}
    return {name: max(values) if values else None for name, values in both.items()}
