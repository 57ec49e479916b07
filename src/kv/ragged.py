"""A cache whose size differs by lane and KV head, with memory really freed: a frozen ragged part and a dense tail.

The cut prompt stands in one buffer of keys and one of values for all lanes and KV heads, without padding
(`src.kv.rows`). Tokens that come later go to every head alike, into a dense tail that grows by `GROW` slots, so
nothing in the middle ever moves. What a policy sees is padded: slots `0..K` are the frozen part, K the longest row of
all lanes, then come the tokens after the prompt in their order. A slot that a head lacks has position -1, logit -inf.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from src.kv.cache import GROW, LayerCache, pad_slots
from src.kv.footprint import Footprint
from src.kv.frozen import check_rows, coded, cut, extended, join, reserve
from src.kv.prompt import precise
from src.kv.rows import Codec, Exact, Part


class RaggedCache(LayerCache):
    """`LayerCache` whose heads hold differing numbers of entries, in one of two ways.

    Growing (`limit` None): frozen rows stay for good, and the tail takes every new token. At capacity (`limit` is the
    longest row): every head holds as many as it ever may, and each new token takes the slot of another or is refused.
    A prompt shorter than its budget (`limit` is more) is at capacity soon: `stack` reserves rows for what is missing.

    Attributes:
        counts: frozen entries, `counts[lane][head]`, reserved ones included.
        parts: the frozen rows. Two after the cut: what the codec encodes, and the newest of each head, which it
            leaves as they are; growing with a `Codec.residual`, later a third: tokens after the prompt.
        keys, values: of the tail only, `(lanes, kv_heads, tail slots, head_dim)`.
        positions: of all slots, `(lanes, kv_heads, slots)`, int32, -1 where there is no token.
        tail: filled slots of the tail, the same in all lanes.
        sealed: tokens after the prompt that are encoded by now.
        used: slots before the first that no head of any lane has filled; with reserved rows, that the lane has filled.
        filled: entries of every head, `(lanes, kv_heads)`.
        last: slot of the last of `counts`, likewise.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tail: tuple[Tensor, Tensor],
        positions: Tensor,
        limit: int | None,
        codec: Codec,
        used: Sequence[int] = (),
    ) -> None:
        self.parts, self.codec, self.limit = list(parts), codec, limit
        (self.keys, self.values), self.positions = tail, positions
        self.tail = self.sealed = 0
        lanes, heads, self.longest = positions.shape
        every = [sum(counts) for counts in zip(*(part.keys.counts for part in parts), strict=True)]
        self.counts = [every[lane * heads : (lane + 1) * heads] for lane in range(lanes)]
        self.used = list(used) or [self.longest] * lanes
        self.most_used = list(self.used)
        self.filled = torch.tensor([self.held(lane) for lane in range(lanes)], device=positions.device)
        self.last = torch.tensor(self.counts, device=positions.device) - 1
        self.footprint = Footprint(lanes)
        self.mask = self._mask()

    @classmethod
    def from_prompt(
        cls,
        keys: Tensor,
        values: Tensor,
        kept: Sequence[Tensor] | Tensor,
        limit: int | None,
        codec: Codec | None = None,
    ) -> RaggedCache:
        """A cache of one lane with copies of the kept tokens only.

        Args:
            keys: the layer's whole prompt, `(kv_heads, n, head_dim)`.
            values: same shape.
            kept: of every KV head, positions to keep, ascending, `(k,)`, at least one.
            limit: None: it grows; the longest row: it is at capacity; more, if all rows are as long: it will be.
            codec: how frozen rows are stored; None: as they are.

        Raises:
            ValueError: a limit that leaves room, a head without a token, or a codec that cannot overwrite at capacity.
        """
        codec = codec or Exact()
        counts = [len(positions) for positions in kept]
        check_rows(counts, limit, codec)
        positions = torch.stack([F.pad(p.to(torch.int32), (0, max(counts) - len(p)), value=-1) for p in kept])
        tail = keys[None, :, :0].clone(), values[None, :, :0].clone()
        return cls(cut(keys, values, kept, codec), tail, positions[None], limit, codec)

    @staticmethod
    def stack(caches: Sequence[LayerCache]) -> RaggedCache:
        """Several lanes right after the cut that go together (`goes_with`). Slots are those of the longest row."""
        ragged = [cache for cache in caches if isinstance(cache, RaggedCache) and not cache.tail + cache.sealed]
        first = ragged[0] if ragged else None
        if first is None or len(ragged) < len(caches) or len({cache.goes_with() for cache in ragged}) > 1:
            raise ValueError("RaggedCache.stack: valid: ragged caches right after the cut, all growing or none")
        room = first.limit is not None and not first.full
        if room:
            ragged = [cache._reserved() for cache in ragged]
        if len(ragged) == 1:
            return ragged[0]
        slots = max(cache.slots for cache in ragged)
        return RaggedCache(
            join(cache.parts for cache in ragged),
            (torch.cat([cache.keys for cache in ragged]), torch.cat([cache.values for cache in ragged])),
            torch.cat([pad_slots(cache.positions, slots, dim=2, value=-1) for cache in ragged]),
            None if first.limit is None else slots,
            first.codec,
            [used for cache in ragged for used in cache.used] if room else [],
        )

    def _reserved(self) -> RaggedCache:
        """One lane with rows for as many entries as it may hold; positions of -1 say that they are empty."""
        assert self.limit is not None
        parts = reserve(self.parts, self.positions.shape[1], self.longest, self.limit - self.longest)
        positions = pad_slots(self.positions, self.limit, dim=2, value=-1)
        return RaggedCache(parts, (self.keys, self.values), positions, self.limit, self.codec, self.used)

    @property
    def slots(self) -> int:
        return self.positions.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, read off the storages."""
        return super().nbytes + sum(rows.nbytes for part in self.parts for rows in part)

    def most_bytes(self, lane: int) -> int:
        reserved = 0 if self.limit is None else self.slots - self.most_used[lane]
        return max(self.footprint.peaks[lane], self._lane_bytes(lane) - reserved * self.entry_bytes)

    def byte_steps(self, lane: int) -> int:
        return self.footprint.total(lane, self._frozen_bytes(lane), self.entry_bytes)

    def _lane_bytes(self, lane: int) -> int:
        return self._frozen_bytes(lane) + self.tail * self.entry_bytes

    def _frozen_bytes(self, lane: int) -> int:
        return sum(rows.nbytes_of(self._segments(lane)) for part in self.parts for rows in part)

    def _segments(self, lane: int) -> slice:
        heads = self.positions.shape[1]
        return slice(lane * heads, (lane + 1) * heads)

    def is_finite(self, lane: int) -> bool:
        frozen = all(rows.is_finite(self._segments(lane)) for part in self.parts for rows in part)
        return frozen and super().is_finite(lane)

    @property
    def full(self) -> bool:
        return self.limit is not None and min(self.used) >= self.limit

    def held(self, lane: int) -> list[int]:
        return [min(count, self.used[lane]) + self.sealed + self.tail for count in self.counts[lane]]

    def by_head(self, lane: int, of_slots: Tensor) -> list[Tensor]:
        there = (self.positions[lane] >= 0).cpu()
        return [of_head[held] for of_head, held in zip(of_slots.cpu(), there, strict=True)]

    def goes_with(self) -> Hashable:
        """Sizes do not matter: nothing is padded. Where there is room, how much there will be does."""
        return "ragged", type(self.codec), self.limit is None or (None if self.full else self.limit)

    def shaped(self, shape: tuple[int, int, int]) -> bool:
        return self.positions.shape == shape

    def lacking(self) -> Tensor | None:
        return None if self.limit is None or self.mask is None else self.positions < 0

    def filled_by_head(self) -> Tensor:
        return self.filled

    def keys_of(self, lanes: slice) -> Tensor:
        """Made anew at every call: all slots of all lanes, decoded and padded."""
        count, heads, slots = self.positions.shape
        out = self.keys.new_zeros(count * heads, slots, self.keys.shape[-1])
        for part in self.parts:
            part.keys.spread(out)
        out = out.view(count, heads, slots, -1)
        out[:, :, self._first_of_tail :] = self.keys
        return out[lanes]

    @property
    def _first_of_tail(self) -> int:
        """The tail's first slot."""
        return self.longest + self.sealed

    def _mask(self) -> Tensor | None:
        """0 where there is a token and -inf where not, `(lanes, kv_heads, 1, slots + 1)`; None: nothing is missing."""
        if self.full and all(count == self.slots for counts in self.counts for count in counts):
            return None
        mask = precise(torch.zeros_like(self.positions, dtype=self.keys.dtype))
        return F.pad(mask.masked_fill_(self.positions < 0, -torch.inf), (0, 1))[:, :, None]

    def logits(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """As for `LayerCache`; -inf also where a head lacks a slot."""
        lanes, heads, group, dim = query.shape
        query = (query * scaling).reshape(-1, group, dim)
        out = query.new_zeros(lanes * heads, group, self.slots + 1)
        for part in self.parts:
            part.keys.logits(query, out)
        if self.keys.shape[2]:
            tail = self.keys.flatten(0, 1).transpose(1, 2)
            out[..., self._first_of_tail : -1] = torch.bmm(query, tail)
        out[..., -1:] = torch.bmm(query, key.reshape(-1, dim, 1))
        logits = precise(out).view(lanes, heads, group, -1)
        return logits if self.mask is None else logits.add_(self.mask)

    def mix(self, weights: Tensor, value: Tensor) -> Tensor:
        weights = weights.to(value.dtype)
        flat = weights.flatten(0, 1)
        out = value.new_zeros(*flat.shape[:2], value.shape[-1])
        for part in self.parts:
            part.values.add_mix(flat, out)
        if self.values.shape[2]:
            out += torch.bmm(flat[..., self._first_of_tail : -1], self.values.flatten(0, 1))
        return out.view(*weights.shape[:3], -1) + weights[..., -1:] * value[:, :, None]

    def ensure_room(self) -> int:
        """Room for one more token in the tail, unless at capacity; returns how many slots were added."""
        if self.limit is not None or self.tail < self.keys.shape[2]:
            return 0
        residual = self.codec.residual
        if residual is not None and self.tail == residual:
            added = residual
            self._seal()
        else:
            added = GROW if residual is None else min(GROW, residual - self.tail)
            self.keys = pad_slots(self.keys, self.tail + added, dim=2)
            self.values = pad_slots(self.values, self.tail + added, dim=2)
        self.positions = pad_slots(self.positions, self.slots + added, dim=2, value=-1)
        self.mask = self._mask()
        return added

    def _seal(self) -> None:
        """Encode the full tail, and what the codec had left of the prompt; slots stay what they are."""
        lanes = range(len(self.used))
        frozen, peaks = [self._frozen_bytes(i) for i in lanes], [self.most_bytes(i) for i in lanes]
        self.footprint.seal(frozen, peaks, self.entry_bytes)
        counts = [self.tail] * (len(self.used) * self.positions.shape[1])
        starts = [self.longest] * len(counts)
        new = [tensor.flatten(0, 2) for tensor in (self.keys, self.values)]
        block = Part(self.codec.keys(new[0], counts, starts), self.codec.values(new[1], counts, starts))
        first, last = self.parts
        self.parts = (
            [first, extended(last, block)] if self.sealed else [extended(first, coded(last, self.codec)), block]
        )
        self.sealed, self.tail = self.sealed + self.tail, 0

    def place(self, victims: Tensor | None, room: int | None = None) -> Tensor:
        """The slot for the incoming token, `(lanes, kv_heads)`: the tail's next, a reserved one, or the victim's."""
        if self.limit is None:
            return torch.full_like(self.filled, self._first_of_tail + self.tail)
        if not self.full:
            return self.filled if victims is None else torch.where(self.filled < self.slots, self.filled, victims)
        if victims is None or (room is not None and room != self.limit):
            raise ValueError(f"room={room}: a ragged cache is at capacity, {self.limit}, and needs a victim")
        return victims

    def write(
        self,
        slot: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        room: int | None = None,
        may_refuse: bool = False,
    ) -> None:
        """As for `LayerCache`. At capacity a slot that a head lacks stands for its last one."""
        if self.limit is None:
            at = self._first_of_tail + self.tail
            self.keys[:, :, self.tail], self.values[:, :, self.tail] = key, value
            self.positions[:, :, at] = position[:, None].to(torch.int32)
            assert self.mask is not None  # only a cache at capacity has none
            self.mask[..., at] = 0
            self.tail += 1
            self.footprint.step(self.tail)
            self.used = [at + 1] * len(self.used)
            self.most_used, self.filled = list(self.used), self.filled + 1
            return
        self.footprint.step(0)
        stored = slot < self.slots if may_refuse else None
        slot = torch.minimum(slot, self.last)
        for part in self.parts:
            for rows, new in zip(part, (key, value), strict=True):
                rows.put(slot.flatten(), new.flatten(0, 1), None if stored is None else stored.flatten())
        where = position[:, None].to(torch.int32)
        if stored is not None:
            where = torch.where(stored, where, self.positions.gather(2, slot[..., None])[..., 0])
        self.positions.scatter_(2, slot[..., None], where.expand_as(slot)[..., None])
        if not self.full:
            assert self.mask is not None  # reserved rows are empty
            self.mask[:, :, 0].scatter_(-1, slot[..., None], 0.0)
            self.used = [min(used + 1, self.slots) for used in self.used]
            self.filled = (self.filled + 1).clamp_max(self.slots)
            self.footprint.without([(self.slots - used) * self.entry_bytes for used in self.used])
            self.most_used, self.mask = list(self.used), self._mask() if self.full else self.mask

    def keep(self, slots: Tensor) -> None:
        """Raises NotImplementedError: frozen rows do not move."""
        raise NotImplementedError("a ragged cache cannot be pruned while decoding; valid: an exact store")

    def select(self, lanes: Tensor, rows: Sequence[int]) -> None:
        """Keep only these lanes; slots stay what they are, also where the longest row has left."""
        heads = range(self.positions.shape[1])
        segments = [lane * len(heads) + head for lane in rows for head in heads]
        self.parts = [Part(part.keys.pick(segments), part.values.pick(segments)) for part in self.parts]
        self.keys, self.values, self.positions = self.keys[lanes], self.values[lanes], self.positions[lanes]
        self.filled, self.last = self.filled[lanes], self.last[lanes]
        self.used, self.most_used = [self.used[i] for i in rows], [self.most_used[i] for i in rows]
        self.counts = [self.counts[i] for i in rows]
        self.footprint.select(rows)
        self.mask = self._mask()
