"""Pools of lanes: how the caches of many lanes take one decoding step.

`LaneBatch` is what `src.engine.attention` hands each layer's queries, keys and values to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from src.engine.attention import Attention, RotateLayer
from src.engine.evictions import Evictions
from src.engine.members import Member
from src.engine.prefill import Fork
from src.kv.cache import LayerCache
from src.kv.faults import describe
from src.kv.step import DecodeStep, Incoming


class Pool:
    """Lanes that may hold equally many entries: one `LayerCache` per layer, one attention call for all.

    It takes over what the forks hold, which are empty afterwards.

    Args:
        forks: the lanes, those of equal cells next to each other; a fidelity lane shares its fork with another.
        row: where the pool's first lane stands in the batch.
    """

    def __init__(self, forks: Sequence[Fork], row: int) -> None:
        self.row = row
        self.evictions = Evictions()  # this step's
        layers = len(forks[0].caches)
        self.caches = [stack_layer(forks) for _ in range(layers)]  # one after the other: one is in memory twice
        slots = [cache.slots for cache in self.caches]
        states = {fork: (fork.take_states(), fork.take_tallies()) for fork in dict.fromkeys(forks)}
        self.members: list[Member] = []
        for cell, group in groupby(forks, key=lambda fork: fork.cell):
            start = self.members[-1].stop if self.members else 0
            own, tallies = zip(*(states[fork] for fork in group), strict=True)
            self.members.append(Member.of(cell, start, own, tallies, slots))
        self.refusing = [m.cell.policy.may_refuse for m in self.members]

    @property
    def lanes(self) -> int:
        return len(self.caches[0].used)

    def begin(self) -> None:
        """Forget the step before."""
        self.evictions = Evictions()

    def step(self, layer: int, new: Incoming) -> Tensor:
        """One token per lane: attend to cache and token, then give the token its slot.

        Returns:
            `(lanes, kv_heads, group, head_dim)`.
        """
        cache, room = self.caches[layer], self.room(layer, new.t)
        added = cache.ensure_room()
        logits = cache.logits(new.query, new.key, new.scaling)
        steps = []
        for m in self.members:
            rows = slice(m.start, m.stop)
            steps.append(DecodeStep(logits[rows], new, cache, rows, m.cell.told(layer)))
            m.adjust_logits(steps[-1])
        weights = logits.softmax(dim=-1)
        for m, step in zip(self.members, steps, strict=True):
            step.weights = weights[m.start : m.stop]
            m.read(step, added)
        out = cache.mix(weights, new.value)
        self._store(layer, new, steps, room)
        return out

    def _store(self, layer: int, new: Incoming, steps: Sequence[DecodeStep], room: int | None) -> None:
        """Every policy takes note of the step and says what goes; then the token is written."""
        cache, pruned = self.caches[layer], False
        for m, step in zip(self.members, steps, strict=True):
            kept = m.observe(step, room)
            if kept is not None:  # the member has the pool to itself
                kept, pruned = self.evictions.kept(layer, cache, kept), True
                cache.keep(kept)
                m.keep(layer, kept)
        victims = None
        if room is not None and not pruned and max(cache.used) >= room:
            victims = self._victims(layer, steps, room)
        slot = cache.place(victims, room)
        for m in self.members:
            m.settle(layer, slot, cache.slots)
        cache.write(slot, new.key, new.value, new.position, room, any(self.refusing))

    def _victims(self, layer: int, steps: Sequence[DecodeStep], room: int) -> Tensor:
        """The slot that goes in every lane and KV head."""
        asked = list(zip(self.members, steps, strict=True))
        if all(m.ranks for m in self.members):
            ranks = [m.rank(step) for m, step in asked]
            return self.evictions.ranked(layer, self.caches[layer], ranks, self.refusing, room)
        victims = [m.evict(step) for m, step in asked]
        return self.evictions.chosen(layer, self.caches[layer], victims, self.refusing, room)

    def member(self, lane: int) -> Member:
        """The member that a lane belongs to."""
        return next(m for m in self.members if m.start <= lane < m.stop)

    def room(self, layer: int, t: int) -> int | None:
        """Entries that the layer's cache may hold after the step; None: any number."""
        limit, first = self.caches[layer].limit, self.members[0]
        return first.room(layer, t, limit) if limit is not None and first.cell.policy.own_pool else limit

    def select(self, keep: Sequence[int], row: int) -> None:
        """Keep only these lanes, in this order (ascending); the first stands in this row of the batch now."""
        self.row = row
        if len(keep) == self.lanes:
            return
        device = self.caches[0].keys.device
        index = torch.tensor(keep, device=device)
        for cache in self.caches:
            cache.select(index, keep)
        members, start = [], 0
        for m in self.members:
            rows = [i - m.start for i in keep if m.start <= i < m.stop]
            if rows:
                members.append(m.select(rows, start, torch.tensor(rows, device=device)))
                start += len(rows)
        self.members = members
        self.refusing = [m.cell.policy.may_refuse for m in members]


def stack_layer(forks: Sequence[Fork]) -> LayerCache:
    """The next layer of all lanes in one cache, taken from the forks."""
    taken = {fork: fork.take_layer() for fork in dict.fromkeys(forks)}
    caches = [taken[fork] for fork in forks]
    return type(caches[0]).stack(caches)


class LaneBatch:
    """All lanes that decode together: rows of the batch in the order of the pools.

    Attributes:
        t: tokens that every lane has taken since its prompt was cut.
        position: original position of each lane's incoming token, `(lanes,)`, int32.
        longest: the longest text of any lane so far, in tokens.
    """

    def __init__(self, pools: list[Pool], rotate: RotateLayer) -> None:
        self.pools, self.rotate = pools, rotate
        self.t, self.longest = 0, 0
        self.watch: Callable[[int, Tensor], None] | None = None  # is shown every layer's attention outputs
        self.position: Tensor  # from `begin` on

    def begin(self, positions: Sequence[int], device: torch.device) -> None:
        """A step begins: where each row's incoming token stands in its text."""
        self.position = torch.tensor(positions, device=device, dtype=torch.int32)
        self.longest = max(positions) + 1
        for pool in self.pools:
            pool.begin()

    def end(self) -> None:
        """Every row has taken its token."""
        self.t += 1

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """One token per lane: `(lanes, heads, 1, head_dim)` in, `(lanes, 1, heads, head_dim)` out."""
        lanes, heads, _, dim = query.shape
        kv_heads = key.shape[1]
        query = query.reshape(lanes, kv_heads, heads // kv_heads, dim)
        key, value = key[:, :, 0], value[:, :, 0]

        def rotate(vectors: Tensor, shift: Tensor) -> Tensor:
            return self.rotate(vectors, shift, layer)

        new = Incoming(query, key, value, self.position, scaling, self.t, layer, rotate)
        parts = [pool.step(layer, new.of(slice(pool.row, pool.row + pool.lanes))) for pool in self.pools]
        out = torch.cat(parts).view(lanes, 1, heads, -1)
        if self.watch is not None:
            self.watch(layer, out)
        return out

    def measures(self, row: int) -> dict[str, Any]:
        """What is measured of a row beside its memory. Fault where its policy cannot say."""
        member, lane, caches = self._member(row)
        return member.measures(lane, caches)

    def attended(self, row: int) -> list[Tensor] | None:
        """Per layer, the share of query heads that attended to each slot of a row at the last step; None: to all."""
        member, lane, _ = self._member(row)
        return None if member.choices is None else member.choices.attended(lane)

    def picks(self, row: int) -> list[Tensor]:
        """Per layer, how often each slot of a row was attended to, `(kv_heads, slots)`; empty: always."""
        member, lane, _ = self._member(row)
        return [] if member.choices is None else member.choices.picks(lane)

    def wrong(self) -> Tensor | None:
        """For which rows the step's evictions are to be doubted, `(rows,)`; None: for none. Read it with the tokens."""
        parts = [pool.evictions.wrong() for pool in self.pools]
        if all(part is None for part in parts):
            return None
        device = self.pools[0].caches[0].positions.device
        fine = [torch.zeros(pool.lanes, dtype=torch.bool, device=device) for pool in self.pools]
        return torch.cat([other if part is None else part for part, other in zip(parts, fine, strict=True)])

    def faults(self, doubted: Sequence[int] = ()) -> Iterator[tuple[int, str, bool]]:
        """Rows whose policy went wrong: the row, what it did, and whether in a question about all its lanes.

        Args:
            doubted: rows that `wrong` says something against, as read.
        """
        for pool in self.pools:
            for member in pool.members:
                if member.error:
                    for lane in range(member.start, member.stop):
                        yield pool.row + lane, member.error, True
        for row in doubted:
            pool = self._pool(row)
            member = pool.member(row - pool.row)
            said = "" if member.error else pool.evictions.say(member, row - pool.row)
            if said:
                yield row, said, False

    def changes_weights(self, row: int) -> bool:
        """Whether a row's policy has a hand in the attention itself."""
        return self._member(row)[0].cell.changes_weights

    def blame(self, row: int, hook: str, what: str) -> str:
        """One line about a row's policy."""
        return describe(self._member(row)[0].cell.policy, hook, what, [])

    def mates(self, row: int) -> range:
        """The rows of the batch that a row's policy is asked about together."""
        pool = self._pool(row)
        member = pool.member(row - pool.row)
        return range(pool.row + member.start, pool.row + member.stop)

    def locate(self, row: int) -> tuple[list[LayerCache], int]:
        """The caches that hold a row of the batch, and the lane's place in them."""
        pool = self._pool(row)
        return pool.caches, row - pool.row

    def _pool(self, row: int) -> Pool:
        return next(p for p in self.pools if p.row <= row < p.row + p.lanes)

    def _member(self, row: int) -> tuple[Member, int, list[LayerCache]]:
        """The member that a row of the batch belongs to, the lane's place in its states, and the pool's caches."""
        pool = self._pool(row)
        member = pool.member(row - pool.row)
        return member, row - pool.row - member.start, pool.caches

    def select(self, keep: Sequence[int]) -> None:
        """Keep only these rows of the batch (ascending); finished lanes leave."""
        pools, row = [], 0
        for pool in self.pools:
            rows = [i - pool.row for i in keep if pool.row <= i < pool.row + pool.lanes]
            if rows:
                pool.select(rows, row)
                pools.append(pool)
                row += len(rows)
        self.pools = pools
