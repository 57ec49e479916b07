"""The journal of kept positions: one frame per sample, appended as soon as the sample is done."""

import json
import logging
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.errors import Damaged
from src.files import append_whole, writing
from src.retention.store import KeptSample, Key

log = logging.getLogger(__name__)
_FRAME = struct.Struct("<4sIQI")  # magic, header bytes, payload bytes, CRC of both
_MAGIC = b"KVR1"


class Journal:
    """An append-only file of samples.

    A torn last frame (the process was killed) is cut off on opening; a damaged one is passed over, as if it were not
    there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frames: dict[Key, Frame] = {}  # of each key the last
        if path.exists():
            self._scan()

    def append(self, sample: KeptSample) -> None:
        arrays = (sample.prompt, sample.end, sample.generated)
        fields = {"key": sample.key, "n": sample.n, "binned": sample.binned, "shape": sample.prompt.shape}
        header = json.dumps(fields).encode()
        payload = zlib.compress(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays), 1)
        frame = _FRAME.pack(_MAGIC, len(header), len(payload), zlib.crc32(header + payload)) + header + payload
        start = append_whole(self.path, frame)
        self.frames[sample.key] = Frame(start, len(frame), sample.binned)

    def read(self, key: Key) -> KeptSample:
        """Raises Damaged: no sound entry of this sample is there."""
        frame, found = self.frames.get(key), None
        if frame is not None:
            with self.path.open("rb") as file:
                file.seek(frame.start)
                found = _parse(file.read(frame.size))
        if found is None:
            raise Damaged(
                f"{self.path}: the entry of {key[0]} {key[1]} is damaged; the same command again computes it anew"
            )
        return found

    def _scan(self) -> None:
        """Find every entry that passes its check. What is damaged is passed over; a torn end is cut off."""
        total = self.path.stat().st_size
        if not total:
            return
        place = lost = end = 0  # `end`: of the last sound entry
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while (start := content.find(_MAGIC, place)) >= 0:
                size = _frame_size(content[start : start + _FRAME.size])
                sample = _parse(content[start : start + size]) if size and start + size <= total else None
                if sample is None:
                    place = start + 1
                    continue
                lost += start - end
                self.frames[sample.key] = Frame(start, size, sample.binned)
                place = end = start + size
        if lost:
            log.warning("%s: %d bytes in the middle are damaged; the samples they held run again", self.path, lost)
        if end < total:
            log.warning("%s: cut off %d bytes of an unfinished entry", self.path, total - end)
            with writing(self.path):
                os.truncate(self.path, end)


class Frame(NamedTuple):
    """Where an entry lies in the journal, and whether it holds counts only."""

    start: int
    size: int
    binned: bool


def _frame_size(head: bytes) -> int:
    if len(head) < _FRAME.size:
        return 0
    _, header_size, payload_size, _ = _FRAME.unpack(head)
    return int(_FRAME.size + header_size + payload_size)


def _parse(frame: bytes) -> KeptSample | None:
    """The sample in an entry; None if it is not as it was written."""
    if _frame_size(frame[: _FRAME.size]) != len(frame):
        return None
    _, header_size, _, crc = _FRAME.unpack_from(frame)
    body = frame[_FRAME.size :]
    if zlib.crc32(body) != crc:
        return None
    try:
        header = json.loads(body[:header_size])
        data = zlib.decompress(body[header_size:])
        task, id_, prompt_hash = header["key"]
        shape, binned = tuple(header["shape"]), bool(header["binned"])
        dtype = np.dtype(np.uint32 if binned else np.uint8)
        size = int(np.prod(shape)) * dtype.itemsize
        first, second = (np.frombuffer(data[i * size : (i + 1) * size], dtype).reshape(shape) for i in (0, 1))
        generated = np.frombuffer(data[2 * size :], np.int32).reshape(shape[:2])
        end = first if np.array_equal(first, second) else second  # as `Retention.sample` has it
        return KeptSample((task, id_, prompt_hash), header["n"], binned, first, end, generated)
    except Exception:  # the check value covers all but the two sizes: with one of them wrong, anything may follow
        return None
