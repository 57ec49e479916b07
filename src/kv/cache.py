"""The one shared cache: keys, values and original positions of one layer, for a batch of lanes.

A *lane* is one prompt being continued under one policy and one budget. Right after the prefill a
`LayerCache` holds one lane and exactly the kept tokens; for decoding, lanes that may hold equally many
tokens are stacked into one `LayerCache` and attended in one call.

Stored per KV head (grouped-query attention is never expanded), every kept token with its original position.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from src.kv.prompt import precise

GROW = 64  # slots added at a time to a cache that may still grow; no concatenation per token


class LayerCache:
    """Keys and values of one layer for `lanes` lanes; slot `s` of lane `l` is filled if `s < used[l]`.

    Args:
        keys: `(lanes, kv_heads, slots, head_dim)`, after the rotary embedding of their original positions.
        values: same shape.
        positions: original positions, `(lanes, kv_heads, slots)`, int32, -1 where empty.
        used: filled slots of each lane (`most_used`: the most there ever were).
        limit: the cache never holds more entries than this per lane and KV head; None: it may grow.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, used: Sequence[int], limit: int | None) -> None:
        self.keys, self.values, self.positions = keys, values, positions
        self.used, self.limit = list(used), limit
        self.most_used = list(used)
        self.entry_steps = [0] * len(self.used)  # entries held, summed over the steps in which some lane had room
        self.full_steps = 0  # the other steps
        self.filled = torch.tensor(self.used, device=keys.device)  # `used`, where kernels can read it
        self.mask = self._mask()
        self._grid = self._lanes_by_heads()

    @classmethod
    def from_prompt(cls, keys: Tensor, values: Tensor, kept: Tensor, limit: int | None) -> LayerCache:
        """A cache with copies of the kept tokens only, so that nothing refers to the whole prompt any more.

        Args:
            keys: the layer's whole prompt, `(kv_heads, n, head_dim)`.
            values: same shape.
            kept: positions to keep, ascending, `(kv_heads, k)`.
            limit: see the class.
        """
        index = kept[..., None].expand(-1, -1, keys.shape[-1])
        values_index = kept[..., None].expand(-1, -1, values.shape[-1])
        return cls(
            keys.gather(1, index)[None],
            values.gather(1, values_index)[None],
            kept.to(torch.int32)[None],
            [kept.shape[1]],
            limit,
        )

    def like(self, keys: Tensor, values: Tensor, positions: Tensor, used: Sequence[int]) -> LayerCache:
        """A cache of the same kind and limit with other contents."""
        return LayerCache(keys, values, positions, used, self.limit)

    @staticmethod
    def stack(caches: Sequence[LayerCache]) -> LayerCache:
        """Several lanes in one cache, padded to equally many slots; all must be of one kind and limit."""
        limit = caches[0].limit
        slots = max(c.slots for c in caches)
        if len(caches) == 1 and caches[0].full:
            return caches[0]
        if any(limit is None or used < limit for c in caches for used in c.used):
            slots = slots + GROW if limit is None else min(limit, slots + GROW)
        return caches[0].like(
            torch.cat([pad_slots(c.keys, slots, dim=2) for c in caches]),
            torch.cat([pad_slots(c.values, slots, dim=2) for c in caches]),
            torch.cat([pad_slots(c.positions, slots, dim=2, value=-1) for c in caches]),
            [used for c in caches for used in c.used],
        )

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, read off the storages: a view of something larger counts in full."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def nbytes_by_device(self) -> dict[str, int]:
        """`nbytes` by where they lie: "device" computes the scores, "host" may hold what it has no room for."""
        return {"device": self.nbytes}

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token's key and value, all KV heads of the layer."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in (self.keys, self.values))

    # What heads hold may differ in number (`src.kv.ragged`); who asks need not know.

    def held(self, lane: int) -> list[int]:
        """Entries of a lane now, by KV head."""
        return [self.used[lane]] * self.positions.shape[1]

    def kept(self, lane: int) -> list[Tensor]:
        """Positions of what a lane holds, by KV head, `(k,)` each, on the host, in the order of its slots."""
        return self.by_head(lane, self.positions[lane])

    def by_head(self, lane: int, of_slots: Tensor) -> list[Tensor]:
        """The entries of `(kv_heads, slots)` where a lane holds a token, by KV head, in the order of `kept`."""
        return list(of_slots[:, : self.used[lane]].to("cpu", copy=True))

    def goes_with(self) -> Hashable:
        """Caches that give the same can be stacked: the same limit, or growing from about the same size."""
        return self.limit or f"grows from about 2^{round(4 * math.log2(self.slots)) / 4}"

    def shaped(self, shape: tuple[int, int, int]) -> bool:
        """Whether keys and values are of so many lanes, KV heads and slots."""
        return self.keys.shape[:3] == shape and self.values.shape[:3] == shape

    def lacking(self) -> Tensor | None:
        """Slots that a KV head lacks though all lanes are full, `(lanes, kv_heads, slots)`; None: there are none."""
        return None

    def filled_by_head(self) -> Tensor:
        """Entries of every lane and KV head, `(lanes, kv_heads)`, where kernels can read them."""
        return self.filled[:, None].expand(-1, self.positions.shape[1])

    def keys_of(self, lanes: slice) -> Tensor:
        """Cached keys of some lanes, `(lanes, kv_heads, slots, head_dim)`."""
        return self.keys[lanes]

    def most_bytes(self, lane: int) -> int:
        """The most bytes of keys and values that a lane has held."""
        return self.entry_bytes * self.most_used[lane]

    def byte_steps(self, lane: int) -> int:
        """Bytes of keys and values that a lane held after each decoding step, summed over the steps."""
        return self.entry_bytes * (self.entry_steps[lane] + self.full_steps * self.used[lane])

    def is_finite(self, lane: int) -> bool:
        """Whether all of a lane's keys and values are numbers."""
        return bool(self.keys[lane].isfinite().all() and self.values[lane].isfinite().all())

    @property
    def full(self) -> bool:
        """Every lane has reached the limit."""
        return self.limit is not None and all(used >= self.limit for used in self.used)

    def _mask(self) -> Tensor | None:
        """0 where filled and -inf where empty, `(lanes, 1, 1, slots + 1)`; None when nothing is empty."""
        if all(used == self.slots for used in self.used):
            return None
        empty = torch.arange(self.slots, device=self.keys.device) >= self.filled[:, None]
        mask = precise(torch.zeros_like(empty, dtype=self.keys.dtype)).masked_fill_(empty, -torch.inf)
        return F.pad(mask, (0, 1))[:, None, None]

    def _lanes_by_heads(self) -> tuple[Tensor, Tensor]:
        """Every lane's and every KV head's index, `(lanes, 1)` and `(1, kv_heads)`: with a slot, where to write."""
        lanes, kv_heads = self.keys.shape[:2]
        device = self.keys.device
        return torch.arange(lanes, device=device)[:, None], torch.arange(kv_heads, device=device)[None]

    def logits(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """Scaled logits of one query per lane over the cache and its own token.

        Args:
            query: `(lanes, kv_heads, group, head_dim)`.
            key: the incoming token's, `(lanes, kv_heads, head_dim)`.

        Returns:
            `(lanes, kv_heads, group, slots + 1)`, float32, -inf on empty slots.
        """
        lanes, kv_heads, group, dim = query.shape
        query = (query * scaling).reshape(-1, group, dim)
        # One contiguous product each: a product written into a slice would run batch by batch on a CPU.
        cached = torch.bmm(query, self.keys.flatten(0, 1).transpose(1, 2))
        own = torch.bmm(query, key.reshape(-1, dim, 1))
        logits = precise(torch.cat([cached, own], dim=-1)).view(lanes, kv_heads, group, -1)
        return logits if self.mask is None else logits.add_(self.mask)

    def mix(self, weights: Tensor, value: Tensor) -> Tensor:
        """Weighted sum of cached and incoming values, `(lanes, kv_heads, group, head_dim)`."""
        weights = weights.to(value.dtype)
        cached = weights[..., :-1].flatten(0, 1) @ self.values.flatten(0, 1)
        return cached.view(*weights.shape[:3], -1) + weights[..., -1:] * value[:, :, None]

    def ensure_room(self) -> int:
        """Grow if a lane that may still grow has no free slot; returns how many slots were added."""
        if self.slots == self.limit or max(self.used) < self.slots:
            return 0
        slots = self.slots + GROW if self.limit is None else min(self.limit, self.slots + GROW)
        added = slots - self.slots
        self.keys = pad_slots(self.keys, slots, dim=2)
        self.values = pad_slots(self.values, slots, dim=2)
        self.positions = pad_slots(self.positions, slots, dim=2, value=-1)
        self.mask = self._mask()
        return added

    def place(self, victims: Tensor | None, room: int | None = None) -> Tensor:
        """The slot for the incoming token, `(lanes, kv_heads)`: the next free one, or else the victim's.

        Args:
            victims: `(lanes, kv_heads)`, needed when a lane already holds `room` entries.
            room: entries a lane may hold now, if fewer than there are slots.
        """
        free = self.filled[:, None].expand(-1, self.keys.shape[1])
        if victims is None:
            return free
        return torch.where(free < (self.slots if room is None else room), free, victims)

    def write(
        self,
        slot: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        room: int | None = None,
        may_refuse: bool = False,
    ) -> None:
        """Put the incoming token into a slot of every lane and KV head.

        Args:
            slot: `(lanes, kv_heads)`, from `place`.
            key, value: `(lanes, kv_heads, head_dim)`.
            position: the token's original position, `(lanes,)`.
            room: as for `place`.
            may_refuse: a slot past the last one means that the token is not stored.
        """
        at = (*self._grid, slot)
        where, stored = position[:, None].to(torch.int32), None
        if may_refuse:  # what stands in the last slot is written back
            stored = slot < self.slots
            at = (*self._grid, slot.clamp_max(self.slots - 1))
            where = torch.where(stored, where, self.positions[at])
        self.put(at, key, value, stored)
        self.positions[at] = where
        if self.mask is not None:  # a lane that was not full filled one more slot, the same for all its heads
            self.mask[:, 0, 0].scatter_(-1, slot[:, :1], 0.0)  # a Python number: the host does not wait
            room = self.slots if room is None else room
            self.used = [min(used + 1, room) for used in self.used]
            self.most_used = [max(most, used) for most, used in zip(self.most_used, self.used, strict=True)]
            self.entry_steps = [sum_ + used for sum_, used in zip(self.entry_steps, self.used, strict=True)]
            self.filled = (self.filled + 1).clamp_(max=room)
            if all(used == self.slots for used in self.used):
                self.mask = None
        else:
            self.full_steps += 1

    def put(self, at: tuple[Tensor, ...], key: Tensor, value: Tensor, stored: Tensor | None) -> None:
        """Store a key and a value `(lanes, kv_heads, ...)` at these indices, except where `stored` is False."""
        for target, new in ((self.keys, key), (self.values, value)):
            index, new = tuple(i.to(target.device) for i in at), new.to(target.device)
            if stored is not None:
                new = torch.where(stored[..., None].to(target.device), new, target[index])
            target[index] = new

    def keep(self, slots: Tensor) -> None:
        """Keep only these slots `(lanes, kv_heads, k)` of every lane, moved to the front; memory stays for reuse."""
        kept = slots.shape[-1]
        self.entry_steps = [s + self.full_steps * used for s, used in zip(self.entry_steps, self.used, strict=True)]
        self.full_steps = 0
        for tensor in (self.keys, self.values):
            at = slots[..., None].to(tensor.device).expand(-1, -1, -1, tensor.shape[-1])
            tensor[:, :, :kept] = tensor.gather(2, at)
        self.positions[:, :, :kept] = self.positions.gather(2, slots)
        self.positions[:, :, kept:] = -1
        self.used = [kept] * len(self.used)
        self.filled = torch.full_like(self.filled, kept)
        self.mask = self._mask()

    def select(self, lanes: Tensor, rows: Sequence[int]) -> None:
        """Keep only these lanes (finished ones leave the batch), given where kernels and where Python read them."""
        self.keys, self.values = self.keys[lanes], self.values[lanes.to(self.values.device)]
        self.positions = self.positions[lanes]
        self.filled = self.filled[lanes]
        self.used, self.most_used = [self.used[i] for i in rows], [self.most_used[i] for i in rows]
        self.entry_steps = [self.entry_steps[i] for i in rows]
        self.mask = self._mask()
        self._grid = self._lanes_by_heads()


def pad_slots(tensor: Tensor, slots: int, dim: int, value: float = 0) -> Tensor:
    """`tensor` with `dim` lengthened to `slots`; the tensor itself when it already is."""
    missing = slots - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=dim)
