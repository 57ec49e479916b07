"""What a policy may know about one decoding step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from src.kv.cache import LayerCache


@dataclass(frozen=True)
class Incoming:
    """The tokens that one layer is handed in one step, one per lane.

    Attributes:
        query: `(lanes, kv_heads, group, head_dim)`, after the rotary embedding.
        key, value: `(lanes, kv_heads, head_dim)`.
        position: `(lanes,)`, original ones.
        scaling: factor between `q @ k` and the logits.
        t: tokens that every lane has taken since its prompt was cut, before this one.
        layer: index of the layer.
        rotate: `rotate(query, shift)` turns rotated vectors by `shift` further positions.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    position: Tensor
    scaling: float
    t: int
    layer: int
    rotate: Callable[[Tensor, Tensor], Tensor]

    def of(self, rows: slice) -> Incoming:
        """Those of some of the lanes."""
        query, key, value, position = self.query[rows], self.key[rows], self.value[rows], self.position[rows]
        return Incoming(query, key, value, position, self.scaling, self.t, self.layer, self.rotate)


class DecodeStep:
    """What a policy may know about one decoding step of one layer, for its lanes.

    What hardly a policy asks for is cut out of the batch when it is asked for.

    Attributes:
        logits: scaled, `(lanes, kv_heads, group, slots + 1)`, float32; the last column is the incoming
            token, empty slots are -inf.
        weights: softmax of `logits`, same shape (the attention the model really uses).
        positions: original positions of the cached tokens, `(lanes, kv_heads, slots)`, -1 where empty.
        budget: entries per KV head that this policy was given.
        limit: the most entries per KV head the cache may ever hold (`Policy.limit`).
        t: tokens appended since the prompt was cut, before this one.
        layer: index of the layer.
        scaling: factor between `q @ k` and `logits`.
    """

    def __init__(self, logits: Tensor, new: Incoming, cache: LayerCache, rows: slice, budget: int) -> None:
        self.logits = logits
        self.weights = logits  # replaced once all policies had their word on the logits
        self.positions = cache.positions[rows]
        self.budget, self.limit = budget, cache.limit
        self.t, self.layer, self.scaling = new.t, new.layer, new.scaling
        self._new, self._cache, self._rows = new, cache, rows

    @cached_property
    def query(self) -> Tensor:
        """`(lanes, kv_heads, group, head_dim)`, after the rotary embedding."""
        return self._new.query[self._rows]

    @cached_property
    def keys(self) -> Tensor:
        """Cached keys, `(lanes, kv_heads, slots, head_dim)`, without the incoming one."""
        return self._cache.keys_of(self._rows)

    @cached_property
    def value(self) -> Tensor:
        """The incoming token's, `(lanes, kv_heads, head_dim)`."""
        return self._new.value[self._rows]

    @cached_property
    def position(self) -> Tensor:
        """Original position of the incoming token, `(lanes,)`."""
        return self._new.position[self._rows]

    def rotate(self, vectors: Tensor, shift: Tensor) -> Tensor:
        """Rotated vectors `(lanes, ..., head_dim)` turned by `shift` `(lanes,)` further positions."""
        return self._new.rotate(vectors, shift)
