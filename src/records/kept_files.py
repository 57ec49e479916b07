"""The kept positions in a run's folder: the journal of what is new, and retention.npz of what was finished."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from src.errors import Damaged
from src.retention import store
from src.retention.journal import Journal
from src.retention.store import KeptSample, Key

JOURNAL, FINISHED = "retention.part", "retention.npz"

log = logging.getLogger(__name__)


class KeptFiles:
    """Both files together. What is damaged in them is left out with a warning, as if it had never been there.

    Args:
        folder: the run's.
        mode: the setting `retention`.
    """

    def __init__(self, folder: Path, mode: str) -> None:
        self.mode = mode
        self.path = folder / FINISHED
        self._journal = Journal(folder / JOURNAL)
        self._finished = self._sound()

    def __contains__(self, key: Key) -> bool:
        return key in self._journal.frames or (self._finished is not None and key in self._finished)

    def suffices(self, key: Key) -> bool:
        """Is there of this sample what `mode` asks for? Counts in bins are not enough for positions."""
        if self.mode == "off":
            return True
        frame = self._journal.frames.get(key)
        if frame is not None:
            return self.mode == "bins" or not frame.binned
        if self._finished is None or key not in self._finished:
            return False
        return self.mode == "bins" or not self._finished.binned(key)

    def append(self, sample: KeptSample) -> None:
        self._journal.append(sample)

    def read(self, keys: Sequence[Key]) -> Iterator[KeptSample]:
        """Raises Damaged: a file was damaged after it had been opened."""
        return map(self._read, keys)

    def finish(self, keys: Sequence[Key]) -> bool:
        """Write retention.npz with these samples, and empty the journal. Returns whether anything was new.

        Raises:
            InputError: it cannot be written. Nothing is lost: the journal still holds what is new.
        """
        if not keys or not (self._journal.frames or self._finished is None or self._finished.keys != list(keys)):
            return False
        store.write_retention(self.path, keys, self._read)
        self._journal.path.unlink(missing_ok=True)
        self._journal = Journal(self._journal.path)
        self.close()
        self._finished = store.load_retention(self.path)
        return True

    def close(self) -> None:
        if self._finished is not None:
            self._finished.close()

    def _read(self, key: Key) -> KeptSample:
        if key in self._journal.frames:
            return self._journal.read(key)
        assert self._finished is not None
        return self._finished.sample(key)

    def _sound(self) -> store.Retention | None:
        if not self.path.exists():
            return None
        then = "are left out (retention=off)" if self.mode == "off" else "run again"
        try:
            found = store.load_retention(self.path)
        except Damaged:
            log.warning("%s: damaged; all samples whose kept positions it held %s", self.path, then)
            return None
        if lost := found.drop_damaged():
            names = ", ".join(f"{task} {id_}" for task, id_, _ in lost[:3]) + (", ..." if len(lost) > 3 else "")
            log.warning("%s: damaged; %d samples (%s) %s", self.path, len(lost), names, then)
        return found
