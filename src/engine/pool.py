"""Pools of lanes: how the caches of many lanes take one decoding step.

`LaneBatch` is what `src.engine.attention` hands each layer's queries, keys and values to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from policies.base import Policy
from src.engine.attention import Attention, Rotate, RotateLayer
from src.engine.evictions import Evictions
from src.engine.members import Member
from src.engine.prefill import Fork
from src.kv.cache import LayerCache
from src.kv.contract import describe
from src.kv.step import DecodeStep


class Pool:
    """Lanes that may hold equally many entries: one `LayerCache` per layer, one attention call for all.

    Args:
        forks: the lanes, those of equal cells next to each other.
        rows: where the pool's first lane stands in the batch.
    """

    def __init__(self, forks: Sequence[Fork], rows: int) -> None:
        self.row = rows
        self.evictions = Evictions()  # this step's
        layers = range(len(forks[0].caches))
        self.caches: list[LayerCache] = []
        distinct = {id(fork): fork for fork in forks}.values()  # a fidelity lane shares its fork
        for _ in layers:  # one layer after the other, so that at most one is in memory twice
            self.caches.append(LayerCache.stack([fork.caches[0] for fork in forks]))
            for fork in distinct:
                del fork.caches[0]
        self.members: list[Member] = []
        start = 0
        while start < len(forks):
            stop = start
            while stop < len(forks) and forks[stop].cell == forks[start].cell:
                stop += 1
            states = [fork.states for fork in forks[start:stop]]
            self.members.append(Member.of(forks[start].cell, start, states, [cache.slots for cache in self.caches]))
            start = stop
        for fork in distinct:
            fork.states = []  # the pool holds the lanes now

    @property
    def lanes(self) -> int:
        return len(self.caches[0].used)

    def step(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        scaling: float,
        t: int,
        rotate: Rotate,
    ) -> Tensor:
        """One token per lane: attend to cache and token, then give the token its slot.

        Args:
            query: `(lanes, kv_heads, group, head_dim)`; key and value `(lanes, kv_heads, head_dim)`.
            position: `(lanes,)`.

        Returns:
            `(lanes, kv_heads, group, head_dim)`.
        """
        cache, room = self.caches[layer], self.room(layer, t)
        added = cache.ensure_room()
        logits = cache.logits(query, key, scaling)
        steps = []
        for m in self.members:
            rows = slice(m.start, m.stop)
            own = logits[rows]
            step = DecodeStep(
                logits=own,
                weights=own,  # replaced below, once all policies had their word on the logits
                query=query[rows],
                keys=cache.keys[rows],
                value=value[rows],
                positions=cache.positions[rows],
                position=position[rows],
                budget=m.cell.budget,
                limit=cache.limit,
                t=t,
                layer=layer,
                scaling=scaling,
                rotate=rotate,
            )
            m.adjust_logits(step)
            steps.append(step)
        weights = logits.softmax(dim=-1)
        for m, step in zip(self.members, steps, strict=True):
            step.weights = weights[m.start : m.stop]
            m.adjust_weights(step, added)
        out = cache.mix(weights, value)
        victims = []
        evicting = room is not None and max(cache.used) >= room
        for m, step in zip(self.members, steps, strict=True):
            kept = m.observe(step, room)
            if kept is not None:  # the member has the pool to itself
                kept = self.evictions.kept(layer, cache, kept)
                cache.keep(kept)
                m.states[layer].keep(kept)
            elif evicting:
                victims.append(m.evict(step))
        refusing = [m.cell.policy.may_refuse for m in self.members]
        slot = cache.place(self.evictions.slots(layer, cache, victims, refusing, room) if victims else None, room)
        for m in self.members:
            m.settle(layer, slot, cache.slots)
        cache.write(slot, key, value, position, room, any(refusing))
        return out

    def error(self, lane: int, doubted: bool) -> str:
        """What a lane's policy did wrong in this step, or earlier; empty if nothing.

        Args:
            doubted: what `evictions.wrong` says about the lane.
        """
        member = self.member(lane)
        return member.error or (self.evictions.say(member.cell.policy, lane) if doubted else "")

    def member(self, lane: int) -> Member:
        """The member that a lane belongs to."""
        return next(m for m in self.members if m.start <= lane < m.stop)

    def room(self, layer: int, t: int) -> int | None:
        """Entries that the layer's cache may hold after the step; None: any number."""
        limit, first = self.caches[layer].limit, self.members[0]
        return first.room(layer, t, limit) if limit is not None and first.cell.policy.own_pool else limit

    def select(self, keep: Sequence[int]) -> None:
        """Keep only these lanes, in this order (ascending)."""
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


class LaneBatch:
    """All lanes that decode together: rows of the batch in the order of the pools.

    Attributes:
        t: tokens that every lane has taken since its prompt was cut.
        position: original position of each lane's incoming token, `(lanes,)`, int32; set before every step.
        longest: the longest text of any lane so far, in tokens.
    """

    def __init__(self, pools: list[Pool], rotate: RotateLayer) -> None:
        self.pools, self.rotate = pools, rotate
        self.t, self.longest = 0, 0
        self.watch: Callable[[int, Tensor], None] | None = None  # is shown every layer's attention outputs
        self.position: Tensor | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """One token per lane: `(lanes, heads, 1, head_dim)` in, `(lanes, 1, heads, head_dim)` out."""
        assert self.position is not None
        lanes, heads, _, dim = query.shape
        kv_heads = key.shape[1]
        query = query.reshape(lanes, kv_heads, heads // kv_heads, dim)
        key, value = key[:, :, 0], value[:, :, 0]
        parts = []

        def rotate(vectors: Tensor, shift: Tensor) -> Tensor:
            return self.rotate(vectors, shift, layer)

        for pool in self.pools:
            rows = slice(pool.row, pool.row + pool.lanes)
            position = self.position[rows]
            parts.append(pool.step(layer, query[rows], key[rows], value[rows], position, scaling, self.t, rotate))
        out = torch.cat(parts).view(lanes, 1, heads, -1)
        if self.watch is not None:
            self.watch(layer, out)
        return out

    def measures(self, row: int) -> dict[str, Any]:
        """What a row's policy has to say about it. ContractError, as from the next two, if it cannot."""
        member, lane, _ = self._member(row)
        return member.measures(lane)

    def attended(self, row: int) -> list[Tensor] | None:
        """Per layer, the share of query heads that attended to each cached token of a row at the last step."""
        member, lane, caches = self._member(row)
        return member.attended(caches, lane) or None

    def picks(self, row: int) -> list[Tensor]:
        """Per layer, how often each slot of a row was attended to, `(kv_heads, slots)`; empty: always."""
        member, lane, caches = self._member(row)
        return member.picks(caches, lane)

    def wrong(self) -> Tensor | None:
        """For which rows the step's evictions are to be doubted, `(rows,)`; None: for none. Read it with the tokens."""
        parts = [pool.evictions.wrong() for pool in self.pools]
        if all(part is None for part in parts):
            return None
        device = self.pools[0].caches[0].positions.device
        fine = [torch.zeros(pool.lanes, dtype=torch.bool, device=device) for pool in self.pools]
        return torch.cat([other if part is None else part for part, other in zip(parts, fine, strict=True)])

    def error(self, row: int, doubted: bool = False) -> str:
        """What a row's policy did wrong in the last step; empty if nothing. `doubted`: what `wrong` says of the row."""
        pool = self._pool(row)
        return pool.error(row - pool.row, doubted)

    def changes_weights(self, row: int) -> bool:
        """Whether a row's policy has a hand in the attention itself, and may be to blame where it gives no numbers."""
        policy = type(self._member(row)[0].cell.policy)
        return any(
            getattr(policy, hook) is not getattr(Policy, hook)
            for hook in ("adjust_logits", "adjust_weights", "make_cache")
        )

    def blame(self, row: int, hook: str, what: str) -> str:
        """One line about a row's policy."""
        return describe(self._member(row)[0].cell.policy, hook, what, [])

    def mates(self, row: int) -> range:
        """The rows of the batch that a row's policy is asked about together."""
        pool = self._pool(row)
        member = pool.member(row - pool.row)
        return range(pool.row + member.start, pool.row + member.stop)

    def begin(self) -> None:
        """Forget the step before."""
        for pool in self.pools:
            pool.evictions = Evictions()

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
            if len(rows) < pool.lanes and rows:
                pool.select(rows)
            pool.row = row
            if rows:
                pools.append(pool)
                row += len(rows)
        self.pools = pools
