"""What was loaded, told by content: a fingerprint of a model's files, so that a folder's new weights are another model.

Every file that loading reads (configuration, tokenizer, chat template, weights) is hashed whole with SHA-256 on every
load. Samples of the blocks would be cheaper, but would miss a flipped bit between them; a digest remembered under a
file's size and time would miss one that the disk flipped, which changes neither. One core hashes about 1.3 GB/s, the
files of a sharded model are hashed side by side, and loading then finds them in the page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from evals.downloads import file_sha256
from src.errors import InputError
from src.models.hub import FILES, NOT

# Beside what is fetched from the hub: vocabularies of other names, and templates in a folder of their own.
READ = (*FILES, "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "additional_chat_templates/*.jinja")
Stamp = tuple[int, int, int]  # size in bytes, time of the last change in ns, inode


@dataclass(frozen=True)
class ModelFiles:
    """A model's files as they were read."""

    folder: Path
    digests: dict[str, str]  # name -> "<size in bytes> <SHA-256>"
    stamps: dict[str, Stamp] = field(repr=False)
    with_code: bool
    fingerprint: str  # 16 hex digits

    def changed(self) -> str | None:
        """The first file that is another one now (or new, or gone); None: all are as they were."""
        now = stamps(self.folder, self.with_code)
        return next((n for n in sorted({*now, *self.stamps}) if now.get(n) != self.stamps.get(n)), None)

    def overwritten(self) -> str | None:
        """The first weights that were written over in place (not: replaced by another file).

        On a CPU the weights stay mapped to their file, so such a write changes a model that is in use.
        """
        for name, before in self.stamps.items():
            try:
                now = stamp(self.folder / name)
            except OSError:
                continue  # removed: what is mapped stays as it was
            if name.endswith(".safetensors") and now[2] == before[2] and now != before:
                return name
        return None

    def refuse(self, name: str | None) -> None:
        """
        Raises:
            InputError: `name` was written since; what is loaded is neither the old model nor the new one.
        """
        if name:
            raise InputError(
                f"{self.folder}: {name} changed while the model was in use; valid: the same command again, once "
                "nothing writes to that folder"
            )


def read_files(folder: Path, with_code: bool = False, fingerprint: str | None = None) -> ModelFiles:
    """Hash a model's folder.

    Args:
        with_code: also the Python files, which `model.trust_remote_code` lets run.
        fingerprint: of what the folder was made from, where it is only a copy.

    Raises:
        InputError: a file that cannot be read, or one of the hub's cache that is not what the hub sent.
    """
    try:
        before = stamps(folder, with_code)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            found = threads.map(lambda name: file_sha256(folder / name), before)
            digests = {name: f"{before[name][0]} {digest}" for name, digest in zip(before, found, strict=True)}
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None
    for name in before:
        refuse_damage(folder / name, digests[name].split()[1])
    return ModelFiles(folder, digests, before, with_code, fingerprint or digest_of(digests))


def stamps(folder: Path, with_code: bool) -> dict[str, Stamp]:
    """Name -> stamp of every file that loading may read, sorted."""
    paths = {path for pattern in READ for path in folder.glob(pattern)}
    if with_code:
        paths.update(folder.rglob("*.py"))
    found = {}
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in NOT):
            found[name] = stamp(path)
    return found


def stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def digest_of(value: Any) -> str:
    """16 hex digits of anything that JSON can hold; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def refuse_damage(path: Path, digest: str) -> None:
    """In the hub's cache a large file's real name is its SHA-256 as the hub knows it."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name) and real.name != digest:
        raise InputError(f"{path}: damaged, its SHA-256 is not the hub's; delete {real}, then it is fetched again")
