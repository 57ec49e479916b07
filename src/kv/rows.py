"""Rows of keys or values whose number differs by lane and KV head: end to end in one buffer, never padded.

A *segment* is the rows of one lane and KV head; segments stand in the order (lane, KV head), rows in slot order.
How rows are coded is a `Codec`'s business: here they are stored as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass
class Run:
    """Neighbouring segments with equally many rows at equal slots: one batched product.

    Attributes:
        first, segments: which.
        start, count: slot of the first row, and how many rows each has.
        before: rows of the block before the first segment.
    """

    first: int
    segments: int
    start: int
    count: int
    before: int

    @property
    def at(self) -> slice:
        return slice(self.first, self.first + self.segments)

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + self.count)

    def of(self, rows: Tensor) -> Tensor:
        """The run's of a block's rows, `(segments, count, ...)`."""
        return rows[self.before : self.before + self.segments * self.count].view(self.segments, self.count, -1)


@dataclass
class Block:
    """Neighbouring segments that are decoded together: which, their rows, and their runs."""

    segments: slice
    rows: slice
    runs: list[Run]


class Rows:
    """The keys or the values of some slots of every segment. Structure is fixed; contents may be overwritten.

    Args:
        planes: what is stored, the segments' parts end to end; here "rows", `(N, head_dim)`.
        counts: rows of every segment.
        starts: slot of every segment's first row.
    """

    at_once: ClassVar[int | None] = None  # rows in a block of several segments; None: any number, nothing is decoded

    def __init__(self, planes: Mapping[str, Tensor], counts: Sequence[int], starts: Sequence[int]) -> None:
        self.planes, self.counts, self.starts = dict(planes), list(counts), list(starts)

    def like(self, planes: Mapping[str, Tensor], counts: Sequence[int], starts: Sequence[int]) -> Self:
        """Rows of the same kind."""
        return type(self)(planes, counts, starts)

    # What a kind of rows answers.

    def span(self, name: str, count: int) -> int:
        """Entries of a plane that belong to a segment with `count` rows."""
        return count

    def decoded(self, block: Block) -> Tensor:
        """A block's rows as the model computed them, or nearly so: `(rows, head_dim)`."""
        return self.planes["rows"][block.rows]

    def logits(self, query: Tensor, out: Tensor) -> None:
        """Write the products with `(segments, group, head_dim)` to their slots of `(segments, group, slots)`."""
        self.multiply(query, self.decoded, out)

    def put(self, slot: Tensor, new: Tensor, stored: Tensor | None) -> None:
        """Overwrite the row in a slot of each segment, where it is one of these rows and `stored` is not False.

        Args:
            slot: `(segments,)`, int64.
            new: `(segments, head_dim)`.
            stored: `(segments,)`, bool.
        """
        if not self.held:
            return
        at, inside = self.find(slot, stored)
        self.replace("rows", self.before + at, new[self.holders], inside)

    # The same for every kind.

    @cached_property
    def blocks(self) -> list[Block]:
        """In order; segments without rows are in no run."""
        blocks: list[Block] = []
        row = 0
        for segment, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            block = blocks[-1] if blocks else None
            if block is None or (self.at_once and row + count - block.rows.start > self.at_once):
                block = Block(slice(segment, segment), slice(row, row), [])
                blocks.append(block)
            last = block.runs[-1] if block.runs else None
            if last and last.at.stop == segment and (last.start, last.count) == (start, count):
                last.segments += 1
            elif count:
                block.runs.append(Run(segment, 1, start, count, row - block.rows.start))
            row += count
            block.segments, block.rows = slice(block.segments.start, segment + 1), slice(block.rows.start, row)
        return [block for block in blocks if block.runs]

    def multiply(self, query: Tensor, rows_of: Callable[[Block], Tensor], out: Tensor) -> None:
        """`logits`, with these rows."""
        for block in self.blocks:
            rows = rows_of(block)
            for run in block.runs:
                out[run.at, :, run.slots] = torch.bmm(query[run.at], run.of(rows).transpose(1, 2))

    def add_mix(self, weights: Tensor, out: Tensor) -> None:
        """Add the rows' sums, weighted by `(segments, group, slots)`, to `(segments, group, head_dim)`."""
        for block in self.blocks:
            rows = self.decoded(block)
            for run in block.runs:
                out[run.at] += torch.bmm(weights[run.at, :, run.slots], run.of(rows))

    def spread(self, out: Tensor) -> None:
        """Write the decoded rows to their slots of `(segments, slots, head_dim)`."""
        for block in self.blocks:
            rows = self.decoded(block)
            for run in block.runs:
                out[run.at, run.slots] = run.of(rows)

    def pieces(self, name: str) -> tuple[Tensor, ...]:
        """A plane by segment."""
        return torch.split(self.planes[name], [self.span(name, count) for count in self.counts])

    def pick(self, segments: Sequence[int]) -> Self:
        """A copy of some of the segments."""
        planes = {}
        for name in self.planes:
            pieces = self.pieces(name)
            planes[name] = torch.cat([pieces[s] for s in segments])
        return self.like(planes, [self.counts[s] for s in segments], [self.starts[s] for s in segments])

    def extended(self, more: Self) -> Self:
        """Every segment followed by its rows of `more`."""
        planes = {}
        for name in self.planes:
            pairs = zip(self.pieces(name), more.pieces(name), strict=True)
            planes[name] = torch.cat([piece for pair in pairs for piece in pair])
        counts = [mine + theirs for mine, theirs in zip(self.counts, more.counts, strict=True)]
        return self.like(planes, counts, self.starts)

    @staticmethod
    def join(several: Sequence[Rows]) -> Rows:
        """The segments of several lanes, one after the other; all must be of one kind."""
        first = several[0]
        planes = {name: torch.cat([rows.planes[name] for rows in several]) for name in first.planes}
        counts = [count for rows in several for count in rows.counts]
        return first.like(planes, counts, [start for rows in several for start in rows.starts])

    @property
    def nbytes(self) -> int:
        """Read off the storages: a view of something larger counts in full."""
        return sum(plane.untyped_storage().nbytes() for plane in self.planes.values())

    def nbytes_of(self, segments: slice) -> int:
        """Bytes that belong to some of the segments."""
        return sum(piece.nbytes for name in self.planes for piece in self.pieces(name)[segments])

    def is_finite(self, segments: slice) -> bool:
        """Whether what is stored of some segments are numbers."""
        pieces = [piece for name in self.planes for piece in self.pieces(name)[segments]]
        return all(bool(piece.isfinite().all()) for piece in pieces if piece.is_floating_point())

    # For `put`: two segments never write to one row. The first write makes index tensors; later ones only use them, so
    # that the host does not wait for the device.

    @cached_property
    def held(self) -> list[int]:
        """Segments with rows."""
        return [segment for segment, count in enumerate(self.counts) if count]

    @cached_property
    def holders(self) -> Tensor:
        """`held`, where kernels can read it."""
        return self.on_device(self.held)

    @cached_property
    def before(self) -> Tensor:
        """Rows of the buffer before each of `held`."""
        return self.sums([self.counts[segment] for segment in self.held])

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Slot of the first row, and number of rows, of each of `held`."""
        starts, counts = ([numbers[s] for s in self.held] for numbers in (self.starts, self.counts))
        return self.on_device(starts), self.on_device(counts)

    def find(self, slot: Tensor, stored: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of each of `held`: a row of its own, and whether it is that slot's and to be written."""
        starts, counts = self.bounds
        at = slot[self.holders] - starts
        inside = (at >= 0) & (at < counts)
        if stored is not None:
            inside &= stored[self.holders]
        return torch.minimum(at.clamp_min(0), counts - 1), inside

    def replace(self, name: str, at: Tensor, new: Tensor, inside: Tensor) -> None:
        """Write entries of a plane where `inside`; what stands there is written back elsewhere."""
        plane = self.planes[name]
        inside = inside.view(-1, *(1,) * (new.dim() - 1))
        plane[at] = torch.where(inside, new.to(plane.dtype), plane[at])

    def on_device(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=next(iter(self.planes.values())).device)

    def sums(self, numbers: Sequence[int]) -> Tensor:
        """What comes before each of these numbers, added up."""
        total = self.on_device(numbers)
        return total.cumsum(0) - total


class Codec(ABC):
    """How frozen rows are stored.

    Class attributes:
        overwrites: a slot's row can be given to another token.
    """

    overwrites: ClassVar[bool] = True

    @property
    def residual(self) -> int | None:
        """New tokens that are held as they are before all of them are encoded at once; None: any number."""
        return None

    def exact(self, count: int) -> int:
        """How many of the newest rows of a segment with `count` are stored as they are when the prompt is cut."""
        return 0

    @abstractmethod
    def keys(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Rows:
        """Keys `(N, head_dim)` encoded; the rest as for `Rows`."""

    @abstractmethod
    def values(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Rows:
        """Values likewise."""


class Exact(Codec):
    """Rows as the model computed them."""

    def keys(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Rows:
        return Rows({"rows": rows}, counts, starts)

    def values(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Rows:
        return Rows({"rows": rows}, counts, starts)


@dataclass
class Part:
    """Keys and values of the same slots."""

    keys: Rows
    values: Rows

    def __iter__(self) -> Iterator[Rows]:
        return iter((self.keys, self.values))
