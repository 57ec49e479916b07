"""Which prompt positions every layer and head kept, on disk: a journal during a run, one .npz after it.

The file `retention.npz` (schema 1) can be read with `numpy.load` alone; nothing in it is pickled.

    schema            int          1
    key               (samples, 3) text: task, id, prompt hash
    n                 (samples,)   prompt length in tokens
    binned            (samples,)   bool: this sample holds counts in 64 bins instead of positions
    end_same          (samples,)   bool: the end kept exactly what the prompt kept, so `end_<i>` is left out
    prompt_<i>        kept after sample i's prompt (six digits): (layers, kv_heads, ceil(n / 8)) uint8, the
                      bits of n positions, first position in the highest bit (`numpy.unpackbits`); or, where
                      binned, (layers, kv_heads, 64) uint32 counts, position p being in bin floor(64 p / n)
    end_<i>           likewise, the prompt positions still held when decoding ended
    generated_<i>     (layers, kv_heads) int32: generated tokens held when decoding ended
"""

import io
import logging
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.errors import Damaged, InputError
from src.files import Npz, replacing

SCHEMA = 1
REMEDY = "launch the run's command again: what is lost is computed anew"
BINS = 64
MODES = ("positions", "bins", "off")
Key = tuple[str, str, str]  # task, id, prompt hash

log = logging.getLogger(__name__)


class Kept(NamedTuple):
    """What the engine hands over: per layer, (kv_heads, k) original positions (tensors, arrays or ragged
    lists).

    Entries at or past the prompt's length are generated tokens; negative entries are padding.
    """

    prompt: Sequence[Any]
    end: Sequence[Any] | None = None  # None: not followed while decoding, taken as unchanged


@dataclass(frozen=True)
class KeptSample:
    """One sample's kept sets. `prompt` and `end` hold packed bits, or counts where `binned`."""

    key: Key
    n: int
    binned: bool
    prompt: NDArray[Any]
    end: NDArray[Any]
    generated: NDArray[np.int32]

    @property
    def task(self) -> str:
        return self.key[0]

    @property
    def id(self) -> str:
        return self.key[1]

    def kept(self, moment: str = "prompt") -> NDArray[np.bool_]:
        """(layers, kv_heads, n) booleans: was this prompt position held at that `moment`, prompt or end?"""
        if self.binned:
            raise InputError(
                f"retention of {self.task} {self.id}: only counts in {BINS} bins are there (retention=bins), "
                "this measure needs retention=positions"
            )
        return np.unpackbits(self._at(moment), axis=-1, count=self.n).astype(bool)

    def counts(self, moment: str = "prompt") -> NDArray[np.int64]:
        """(layers, kv_heads, 64) kept entries per bin of relative position."""
        stored = self._at(moment)
        return stored.astype(np.int64) if self.binned else bin_counts(self.kept(moment))

    def _at(self, moment: str) -> NDArray[Any]:
        if moment not in ("prompt", "end"):
            raise ValueError(f"moment={moment!r}: prompt or end")
        return self.prompt if moment == "prompt" else self.end


def bin_edges(n: int, bins: int = BINS) -> NDArray[np.int64]:
    """edges[b] is the first position of bin b; position p of n lies in bin floor(bins p / n)."""
    return -(-np.arange(bins + 1, dtype=np.int64) * n // bins)


def bin_counts(kept: NDArray[np.bool_], bins: int = BINS) -> NDArray[np.int64]:
    """Kept entries in each of `bins` bins of relative position along the last axis."""
    n = kept.shape[-1]
    head, position = np.divmod(np.flatnonzero(kept), max(n, 1))  # few are kept: their list is short
    heads = math.prod(kept.shape[:-1])
    return np.bincount(head * bins + position * bins // max(n, 1), minlength=heads * bins).reshape(
        *kept.shape[:-1], bins
    )


def kept_sample(key: Key, n: int, kept: Kept, mode: str = "positions") -> KeptSample:
    """Turn the engine's positions into what is stored."""
    prompt, generated = _bits(kept.prompt, n)
    end, generated = (prompt, generated) if kept.end is None else _bits(kept.end, n)
    if mode == "bins":
        first, last = (bin_counts(bits).astype(np.uint32) for bits in (prompt, end))
        return KeptSample(key, n, True, first, last, generated)
    return KeptSample(key, n, False, np.packbits(prompt, axis=-1), np.packbits(end, axis=-1), generated)


def _bits(layers: Sequence[Any], n: int) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    rows = [[_positions(head) for head in _host(layer)] for layer in layers]
    bits = np.zeros((len(rows), len(rows[0]) if rows else 0, n), dtype=bool)
    generated = np.zeros(bits.shape[:2], dtype=np.int32)
    for layer, heads in enumerate(rows):
        for head, positions in enumerate(heads):
            bits[layer, head, positions[(positions >= 0) & (positions < n)]] = True
            generated[layer, head] = np.count_nonzero(positions >= n)
    return bits, generated


def _host(layer: Any) -> Any:
    return layer.detach().cpu().numpy() if hasattr(layer, "detach") else layer


def _positions(head: Any) -> NDArray[np.int64]:
    return np.asarray(_host(head), dtype=np.int64).reshape(-1)


# --- the journal: one frame per sample, appended as soon as the sample is done ---


# --- the finished file ---


class Retention:
    """A finished `retention.npz`, read lazily: only the samples asked for are loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = Npz(path)
            schema = int(self._file["schema"])
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; a finished run with retention=positions writes it") from None
        except (Damaged, TypeError, ValueError):
            raise Damaged(f"{path}: not a retention file (or damaged); {REMEDY}") from None
        if schema != SCHEMA:
            raise InputError(
                f"{path}: retention schema {schema}, this version reads schema {SCHEMA}; "
                "run the same command with overwrite=true to write it anew"
            )
        try:
            self._n, self._binned, self._end_same = (self._file[name] for name in ("n", "binned", "end_same"))
            self.keys: list[Key] = [(str(t), str(i), str(h)) for t, i, h in self._file["key"]]
        except (Damaged, TypeError, ValueError):
            raise Damaged(f"{path}: damaged; {REMEDY}") from None
        self._index = {key: i for i, key in enumerate(self.keys)}

    def drop_damaged(self) -> list[Key]:
        """Read every sample once, leave out those that fail, and return them."""
        bad = {key: self._index.pop(key) for key in self.keys if not self._is_sound(key)}
        self.keys = [key for key in self.keys if key not in bad]
        return list(bad)

    def _is_sound(self, key: Key) -> bool:
        try:
            self.sample(key)
        except Damaged:
            return False
        return True

    def binned(self, key: Key) -> bool:
        """Are there only counts of this sample?"""
        return bool(self._binned[self._index[key]])

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: Key) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[KeptSample]:
        return (self.sample(key) for key in self.keys)

    def sample(self, key: Key) -> KeptSample:
        """Raises Damaged: these bytes fail the archive's check."""
        i = self._index[key]
        try:
            prompt = self._file[f"prompt_{i:06d}"]
            end = prompt if self._end_same[i] else self._file[f"end_{i:06d}"]
            generated = self._file[f"generated_{i:06d}"]
        except Damaged:
            raise Damaged(f"{self.path}: damaged at sample {key[0]} {key[1]}; {REMEDY}") from None
        return KeptSample(key, int(self._n[i]), bool(self._binned[i]), prompt, end, generated)

    def close(self) -> None:
        self._file.close()


def load_retention(path: str | Path) -> Retention:
    """Open a `retention.npz`, or the one in a run's folder."""
    path = Path(path)
    return Retention(path / "retention.npz" if path.is_dir() else path)


def write_retention(path: Path, keys: Sequence[Key], read: Any) -> None:
    """Write the samples `read(key)` of all keys, one at a time; the file appears only when complete.

    Raises InputError: it cannot be written.
    """
    n, binned, same = [], [], []
    with replacing(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as file:
        for i, key in enumerate(keys):
            sample: KeptSample = read(key)
            n.append(sample.n)
            binned.append(sample.binned)
            same.append(np.array_equal(sample.prompt, sample.end))
            _member(file, f"prompt_{i:06d}", sample.prompt)
            if not same[-1]:
                _member(file, f"end_{i:06d}", sample.end)
            _member(file, f"generated_{i:06d}", sample.generated)
        _member(file, "schema", np.asarray(SCHEMA))
        _member(file, "key", np.asarray(keys, dtype=np.str_).reshape(len(keys), 3))
        _member(file, "n", np.asarray(n, dtype=np.int64))
        _member(file, "binned", np.asarray(binned, dtype=bool))
        _member(file, "end_same", np.asarray(same, dtype=bool))


def _member(file: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))  # fixed date: equal runs, equal bytes
    info.compress_type = zipfile.ZIP_DEFLATED
    file.writestr(info, buffer.getvalue())
