"""Files that are there whole or not at all, and one line where they cannot be written or are damaged."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.downloads import user_cache
from src.errors import Damaged, InputError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around everything that writes `path`.

    Raises:
        InputError: the system's reason against it, in one line.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


def no_room(error: OSError) -> str | None:
    """One line for a disk that is full or fails, wherever that came out; None for all other errors."""
    if error.errno not in NO_ROOM:
        return None
    return f"{error.filename or 'the disk'}: cannot be written ({error.strerror})"


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """A file to write beside `path`, which it replaces once it is whole; if it is not, it is removed.

    Args:
        sync: wait until it is on the disk, so that a power failure cannot cost it either.

    Raises:
        InputError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        try:
            yield part
            if sync:
                with part.open("rb+") as done:
                    os.fsync(done.fileno())
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def write_whole(path: Path, content: str | bytes, sync: bool = True) -> None:
    """All of the new content or all of the old, never a part. Raises InputError."""
    with replacing(path, sync) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def append_whole(path: Path, content: bytes) -> int:
    """Add `content` at the end and return where it begins; what a full disk cuts short is taken away again.

    Raises:
        InputError: it cannot be written; the file is as before.
    """
    with writing(path), path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]  # a nearly full disk takes a part first, and then none
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(start)
            raise
    return start


def write_npz(path: Path, **arrays: NDArray[Any]) -> None:
    """A small compressed .npz, whole or not at all; its folder is made. Raises InputError."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    write_whole(path, content.getvalue())


class Npz:
    """The arrays of a .npz. Each is compared with the archive's check value when it is read.

    `numpy.load` reads only as far as an array's own header says, so that damage of the header escapes that check.

    Raises:
        FileNotFoundError: no such file.
        Damaged: no archive, an array that is not there, or one that fails its check.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._damaged(error) from None

    def __getitem__(self, name: str) -> NDArray[Any]:
        try:
            content = io.BytesIO(self._file.read(f"{name}.npy"))
            array: NDArray[Any] = np.lib.format.read_array(content, allow_pickle=False)
            return array
        except Exception as error:  # one wrong byte makes zipfile, zlib or numpy raise nearly anything
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> Damaged:
        return Damaged(f"{self.path}: damaged ({type(error).__name__})")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Npz:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


CACHE_NAME = "kv-eviction-bench"


def cache_folder() -> Path:
    """Where unpacked copies are kept: in $XDG_CACHE_HOME or ~/.cache."""
    return user_cache() / CACHE_NAME


def file_name(task: str, sample: str) -> str:
    """For files of one sample: `<task>-<id>`, no two alike, also where upper and lower case are the same.

    An id that is long or holds anything but lower-case letters, digits, `_`, `.` and `-` is shortened to what is
    readable of it, followed by `~` (which no other name has) and a hash. No task's name is another's with a dash.
    """
    name = f"{task}-{sample}"
    if re.fullmatch(r"[a-z0-9_.-]{1,120}", name):
        return name
    digest = hashlib.sha256(json.dumps([task, sample]).encode()).hexdigest()[:24]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}~{digest}"
