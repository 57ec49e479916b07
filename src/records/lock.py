"""Who may write a run's folder: one process, or several that share it and take turns."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.errors import InputError
from src.files import writing

log = logging.getLogger(__name__)


class FolderLock:
    """A folder, made if it is not there, held until `close`; the system frees it when the process dies.

    Args:
        shared: others that share, too, may hold it at once (jobs of a cluster launch).

    Raises:
        InputError: another process holds it, or it cannot be written.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        self.path, self.shared = path, shared
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._file = (path / ".lock").open("w")
        except OSError as error:
            raise InputError(f"{path}: cannot write the results folder ({error.strerror})") from None
        try:
            fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"{path}: another process is writing this results folder; wait for it or stop it"
            ) from None
        except OSError as error:
            log.warning("%s: this file system cannot lock (%s); start no second run here", path, error.strerror)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Alone with the folder's files, also among those that share it; never nested."""
        if not self.shared:
            yield
            return
        with writing(self.path / ".turn"):
            file = (self.path / ".turn").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # freed when closed
            except OSError as error:
                raise InputError(
                    f"{self.path}: this file system cannot lock ({error.strerror}), so jobs cannot share it; "
                    "valid: another output_root, or cluster=local"
                ) from None
            yield

    def close(self) -> None:
        """Let other processes have the folder."""
        self._file.close()
