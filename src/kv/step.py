"""What a policy may know about one decoding step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class DecodeStep:
    """What a policy may know about one decoding step of one layer, for its lanes.

    Attributes:
        logits: scaled, `(lanes, kv_heads, group, slots + 1)`, float32; the last column is the incoming
            token, empty slots are -inf.
        weights: softmax of `logits`, same shape (the attention the model really uses).
        query: `(lanes, kv_heads, group, head_dim)`, after the rotary embedding.
        keys: cached keys, `(lanes, kv_heads, slots, head_dim)`, without the incoming one.
        value: the incoming token's, `(lanes, kv_heads, head_dim)`.
        positions: original positions of the cached tokens, `(lanes, kv_heads, slots)`, -1 where empty.
        position: original position of the incoming token, `(lanes,)`.
        budget: entries per KV head that this policy was given.
        limit: the most entries per KV head the cache may ever hold (`Policy.limit`).
        t: tokens appended since the prompt was cut, before this one.
        layer: index of the layer.
        scaling: factor between `q @ k` and `logits`.
        rotate: `rotate(query, shift)` turns rotated vectors by `shift` further positions.
    """

    logits: Tensor
    weights: Tensor
    query: Tensor
    keys: Tensor
    value: Tensor
    positions: Tensor
    position: Tensor
    budget: int
    limit: int | None
    t: int
    layer: int
    scaling: float
    rotate: Callable[[Tensor, Tensor], Tensor]
