"""A cache in two places: product-quantised keys where scores are computed, values in the host's memory.

What HCAttention (arXiv 2507.19823) needs; either half can be left out. On a machine without an accelerator both
places are the same memory, and the accounting still tells them apart.

Product quantisation: a key of d dimensions is cut into g groups of d/g, and each group is replaced by the index of
the nearest of c centroids, so a key takes g indices. Attention scores come from a table of the query's products
with all centroids, (g x c), at a cost that does not depend on the number of tokens:

    table[i, m] = q_i . C[i, m]        z_j = sum over groups i of table[i, index[j, i]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from src.kv.cache import LayerCache
from src.kv.prompt import precise

BLOCK = 1 << 24  # distances computed at a time


class SplitCache(LayerCache):
    """`LayerCache` whose `keys` may be indices `(lanes, kv_heads, slots, g)` and whose values may lie on the host.

    Args:
        centroids: `(kv_heads, g, c, d/g)`; None: keys are stored as they are.
        index_type: of the stored indices.
        host: keep the values in the host's memory (pinned, if there is an accelerator), and mix them there.
        The rest as for `LayerCache`.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        used: Sequence[int],
        limit: int | None,
        centroids: Tensor | None,
        index_type: torch.dtype,
        host: bool,
    ) -> None:
        self.centroids, self.index_type, self.host = centroids, index_type, host
        super().__init__(keys, on_host(values) if host else values, positions, used, limit)

    @classmethod
    def split(
        cls,
        plain: LayerCache,
        centroids: Tensor | None,
        index_type: torch.dtype = torch.int16,
        host: bool = True,
        codes: Tensor | None = None,
    ) -> SplitCache:
        """The contents of an ordinary cache; `codes`: of its keys (`encode`), if they are known already."""
        if centroids is None:
            keys = plain.keys
        else:
            keys = (encode(plain.keys, centroids) if codes is None else codes).to(index_type)
        return cls(keys, plain.values, plain.positions, plain.used, plain.limit, centroids, index_type, host)

    def like(self, keys: Tensor, values: Tensor, positions: Tensor, used: Sequence[int]) -> SplitCache:
        return SplitCache(keys, values, positions, used, self.limit, self.centroids, self.index_type, self.host)

    def nbytes_by_device(self) -> dict[str, int]:
        values = self.values.untyped_storage().nbytes()
        device = self.nbytes - values if self.host else self.nbytes
        return {"device": device, "host": self.nbytes - device}

    def logits(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """As for `LayerCache`; the incoming token's own key is not quantised yet."""
        if self.centroids is None:
            return super().logits(query, key, scaling)
        query = query * scaling
        cached = look_up(tables(query, self.centroids), self.keys)
        own = precise(query @ key[..., None])
        logits = torch.cat([cached, own], dim=-1)
        return logits if self.mask is None else logits.add_(self.mask)

    def mix(self, weights: Tensor, value: Tensor) -> Tensor:
        """As for `LayerCache`. On the host only tokens with a weight take part, and only those weights travel."""
        if not self.host:
            return super().mix(weights, value)
        weights = weights.to(value.dtype)
        cached = weighted_sum(weights[..., :-1], self.values).to(value.device)
        return cached + weights[..., -1:] * value[:, :, None]

    def put(self, at: tuple[Tensor, ...], key: Tensor, value: Tensor, stored: Tensor | None) -> None:
        if self.centroids is not None:
            key = encode(key[:, :, None], self.centroids)[:, :, 0].to(self.index_type)
        super().put(at, key, value, stored)

    def ensure_room(self) -> int:
        added = super().ensure_room()
        if added and self.host:
            self.values = on_host(self.values)
        return added

    def select(self, lanes: Tensor, rows: Sequence[int]) -> None:
        super().select(lanes, rows)
        if self.host:
            self.values = on_host(self.values)


def encode(keys: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of every group.

    Args:
        keys: `(lanes, kv_heads, n, head_dim)`.
        centroids: `(kv_heads, g, c, head_dim / g)`.

    Returns:
        `(lanes, kv_heads, n, g)`, int64.
    """
    lanes, kv_heads, n, _ = keys.shape
    groups, count, size = centroids.shape[1:]
    parts, exact = precise(keys).reshape(lanes, kv_heads, n, groups, size), precise(centroids)
    codes = torch.empty(lanes, kv_heads, n, groups, dtype=torch.int64, device=keys.device)
    half = exact.square().sum(-1) / 2  # |k - C|^2 / 2 = |k|^2 / 2 - k.C + |C|^2 / 2, and the first is the same for all
    step = max(1, BLOCK // (lanes * kv_heads * count))
    for i in range(groups):
        for start in range(0, n, step):
            rows = parts[:, :, start : start + step, i]
            codes[:, :, start : start + step, i] = (rows @ exact[:, i].transpose(1, 2) - half[:, i, None]).argmax(-1)
    return codes


def tables(query: Tensor, centroids: Tensor) -> Tensor:
    """Products of every query with all centroids, `(lanes, kv_heads, group, g, c)`, float32.

    Args:
        query: `(lanes, kv_heads, group, head_dim)`, scaled.
        centroids: `(kv_heads, g, c, head_dim / g)`.
    """
    parts = query.view(*query.shape[:-1], centroids.shape[1], centroids.shape[3])
    return torch.einsum("lhqgs,hgcs->lhqgc", precise(parts), precise(centroids))


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Sums of table entries: `(lanes, kv_heads, group, g, c)` and `(lanes, kv_heads, n, g)` -> logits `(.., group, n)`.

    One bag per cached token: its g entries are added up without a tensor of all of them.
    """
    lanes, kv_heads, group, groups, count = table.shape
    heads = lanes * kv_heads
    rows = table.permute(0, 1, 3, 4, 2).reshape(heads * groups * count, group)
    kind = torch.int32 if len(rows) < 2**31 else torch.int64
    first = torch.arange(heads * groups, device=codes.device, dtype=kind).view(heads, 1, groups) * count
    bags = codes.reshape(heads, -1, groups).to(kind) + first
    sums = F.embedding_bag(bags.flatten(0, 1), rows, mode="sum")
    return sums.view(lanes, kv_heads, -1, group).transpose(2, 3)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sum of values where the values are, from the weights that are not zero.

    Args:
        weights: `(lanes, kv_heads, group, slots)`, on any device.
        values: `(lanes, kv_heads, slots, head_dim)`.

    Returns:
        `(lanes, kv_heads, group, head_dim)`, on the values' device.
    """
    lanes, kv_heads, group, slots = weights.shape
    most = int((weights > 0).sum(-1).max())
    if most * group >= slots:  # gathering would cost more than it saves
        return weights.to(values.device) @ values
    top = weights.topk(most, dim=-1)
    chosen, at = top.values.to(values.device), top.indices.to(values.device)
    rows = at.flatten(2)[..., None].expand(-1, -1, -1, values.shape[-1])
    picked = values.gather(2, rows).view(lanes, kv_heads, group, most, values.shape[-1])  # most may be 0
    return (chosen[..., None, :] @ picked)[..., 0, :]


def on_host(values: Tensor) -> Tensor:
    """In the host's memory; page-locked if there is an accelerator to talk to."""
    values = values.cpu()
    return values.pin_memory() if torch.cuda.is_available() else values
