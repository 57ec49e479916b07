"""What the lanes of a ragged cache have held over their steps, in bytes."""

from __future__ import annotations

from collections.abc import Sequence


class Footprint:
    """Sums and peaks of each lane. Between two encodings only the tail's length changes.

    Attributes:
        steps, tail_steps: since the last encoding, and the tail's slots summed over them.
    """

    def __init__(self, lanes: int) -> None:
        self.peaks, self.sums = [0] * lanes, [0] * lanes
        self.steps = self.tail_steps = 0

    def step(self, tail: int) -> None:
        """A token has come; so many slots of the tail are filled."""
        self.steps, self.tail_steps = self.steps + 1, self.tail_steps + tail

    def without(self, empty: Sequence[int]) -> None:
        """In the last step so many of each lane's bytes held nothing yet."""
        self.sums = [total - unused for total, unused in zip(self.sums, empty, strict=True)]

    def total(self, lane: int, frozen: int, entry: int) -> int:
        """Over all steps, for so many bytes of frozen rows and of a slot of the tail."""
        return self.sums[lane] + self.steps * frozen + self.tail_steps * entry

    def seal(self, frozen: Sequence[int], peaks: Sequence[int], entry: int) -> None:
        """What was held until now, before rows of other sizes take its place."""
        self.sums = [self.total(lane, held, entry) for lane, held in enumerate(frozen)]
        self.peaks, self.steps, self.tail_steps = list(peaks), 0, 0

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these lanes."""
        self.peaks, self.sums = [self.peaks[i] for i in rows], [self.sums[i] for i in rows]
