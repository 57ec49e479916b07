"""Watching lanes while they are decoded, without a hand in it: `Engine(model, probes=[...])`.

A probe is shown lanes that answer a request. Those that are there for the others' sake (the full cache that fidelity
compares with, or that a policy's look ahead needs) and those that read a reference answer are not shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from src.engine.pool import LaneBatch
from src.engine.request import Generation
from src.kv.cache import LayerCache


@dataclass(frozen=True, eq=False)
class LaneView:
    """One lane right after a step, to look at during the call only. Tensors are the cache's own, not copies.

    Attributes:
        generation: what the lane has produced so far.
        t: tokens that it has read since its prompt was cut.
    """

    generation: Generation
    t: int
    _batch: LaneBatch
    _row: int

    @property
    def kept(self) -> list[Tensor]:
        """Per layer, original positions of what is cached, `(kv_heads, k)`, int32, in the order of the slots."""
        return [cache.positions[self.row, :, : cache.used[self.row]] for cache in self.caches]

    @property
    def caches(self) -> list[LayerCache]:
        """Per layer, the cache that holds the lane, beside others."""
        return self._batch.locate(self._row)[0]

    @property
    def row(self) -> int:
        """The lane's place in `caches`."""
        return self._batch.locate(self._row)[1]

    def attended(self) -> list[Tensor] | None:
        """Per layer, the share of query heads that attended to each entry of `kept` in the step, `(kv_heads, k)`.

        None: all to everything.
        """
        shares = self._batch.attended(self._row)
        return shares and [share[:, : kept.shape[1]] for share, kept in zip(shares, self.kept, strict=True)]


class Probe(Protocol):
    """Looks, and changes nothing. A class that inherits from this one gives the methods that it needs."""

    def on_cut(self, generation: Generation) -> None:
        """A lane begins: its prompt is cut (`kept_prompt`). Where memory ran out a request may begin once more."""

    def on_step(self, lane: LaneView) -> None:
        """A lane has read a token, and said the next."""
