"""Lanes: how a prompt is forked into caches, and how the caches of many lanes take one decoding step.

`Prefill` and `LaneBatch` are what `src.attention` hands each layer's queries, keys and values to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policies.base import Policy, State
from src.cache import DecodeStep, LayerCache
from src.contract import (
    RAISED,
    Doubt,
    beyond_policy,
    check_cache,
    check_kept,
    check_limit,
    check_measures,
    check_start,
    describe,
    fault,
)
from src.evictions import Evictions
from src.members import Member
from src.prompt_attention import PromptAttention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotate = Callable[[Tensor, Tensor], Tensor]
RotateLayer = Callable[[Tensor, Tensor, int], Tensor]  # the last one: which layer's vectors they are


@dataclass(frozen=True)
class Cell:
    """One policy at one budget (entries per layer and KV head; resolved, never a fraction)."""

    policy: Policy
    budget: int


class Fork:
    """One prompt under one cell: what is left of it in every layer.

    Attributes:
        error: what the cell's policy did wrong; empty if nothing. Nothing is left of the prompt then.
        doubts: what must still be looked at, by layer.
    """

    def __init__(self, cell: Cell, length: int) -> None:
        self.error = ""
        self.doubts: list[tuple[int, Doubt]] = []
        self.cell, self.length = cell, length  # length: prompt tokens
        self.caches: list[LayerCache] = []
        self.states: list[State] = []
        self.full_nbytes = 0  # of the whole prompt's keys and values, as the model computes them
        self._measured: list[dict[str, Tensor]] = []  # what the policy has to say about each layer's prompt

    def pool_key(self) -> object:
        """Lanes with equal keys are attended in one call: the same limit, or about the same size and growing."""
        limit: object = self.caches[0].limit
        if limit is None:
            limit = f"grows from about 2^{round(4 * math.log2(max(c.slots for c in self.caches))) / 4}"
        return limit, self.cell if self.cell.policy.own_pool else None

    def add_layer(self, prompt: PromptAttention) -> None:
        if self.error:
            return
        policy, budget, hook = self.cell.policy, self.cell.budget, "prompt_limit"
        heads, length = prompt.kv_heads, prompt.length
        prompt.doubts.clear()
        try:
            most = min(policy.prompt_limit(budget, length), length)
            hook = "keep_prompt"
            kept, doubt = check_kept(policy.keep_prompt(prompt, budget), heads, length, most, prompt.keys.device)
            self.doubts += [(prompt.layer, d) for d in (*prompt.doubts, doubt)]
            hook, entries = "limit", kept.shape[1]
            bound = budget if policy.uses_budget and not policy.uses_decode_budget else None
            limit = check_limit(policy.limit(budget, entries), entries, bound, not policy.evicts_while_decoding)
            hook = "make_cache"
            self.caches.append(policy.make_cache(prompt, kept, limit))
            check_cache(self.caches[-1], (1, heads, entries), limit)
            hook = "start"
            self.states.append(policy.start(prompt, kept, budget))
            check_start(self.states[-1], heads, entries)
            hook = "prompt_measures"
            self._measured.append(check_measures(policy.prompt_measures(prompt, budget), Tensor))
        except RAISED as error:
            if beyond_policy(error):
                raise
            self.fail(fault(policy, hook, prompt.layer, error))
        self.full_nbytes += prompt.keys.nbytes + prompt.values.nbytes

    def fail(self, error: str) -> None:
        """Its policy is asked nothing more, and its caches go."""
        self.error, self.caches, self.states, self._measured = error, [], [], []
        self.doubts = []

    def measures(self) -> dict[str, Tensor]:
        """`Policy.prompt_measures` of all layers, stacked; nothing, and an `error`, if they do not agree."""
        try:
            return {name: torch.stack([layer[name] for layer in self._measured]) for name in self._measured[0]}
        except RAISED as error:
            if beyond_policy(error):
                raise
            self.fail(fault(self.cell.policy, "prompt_measures", None, error))
            return {}

    def nbytes(self) -> int:
        """Exact bytes of keys and values."""
        return sum(cache.nbytes for cache in self.caches)

    def nbytes_by_device(self) -> dict[str, int]:
        """`nbytes` by where they lie."""
        total: Counter[str] = Counter()
        for cache in self.caches:
            total.update(cache.nbytes_by_device())
        return dict(total)

    def bookkeeping_nbytes(self) -> int:
        """Bytes kept beside keys and values: positions and the policy's state."""
        positions = sum(cache.positions.untyped_storage().nbytes() for cache in self.caches)
        return positions + sum(state.nbytes() for state in self.states)


class Prefill:
    """A prompt's forward pass: full causal attention, and every cell's cut of each layer right after it.

    Args:
        foreseen: per layer, for policies that look ahead: see `src.foresight`.
    """

    def __init__(
        self, cells: Sequence[Cell], layers: int, length: int, foreseen: Sequence[Mapping[str, Tensor]] = ()
    ) -> None:
        self.forks = [Fork(cell, length) for cell in cells]
        self.layers, self.longest, self.foreseen = layers, length, foreseen

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """All prompt tokens at once: `(1, heads, n, head_dim)` in, `(1, n, heads, head_dim)` out."""
        foreseen = self.foreseen[layer] if self.foreseen else None
        prompt = PromptAttention(query[0], key[0], value[0], scaling, layer, self.layers, foreseen)
        for fork in self.forks:
            fork.add_layer(prompt)
        return attention(query, key, value)

    def settle(self) -> None:
        """Read what the policies' positions and scores came to, all at once: the host waits for the device."""
        open_ = [(fork, layer, doubt) for fork in self.forks for layer, doubt in fork.doubts]
        found = torch.cat([doubt.numbers for _, _, doubt in open_]).tolist() if open_ else []
        end = 0
        for fork, layer, doubt in open_:
            start, end = end, end + len(doubt.numbers)
            wrong = "" if fork.error else doubt.judge(found[start:end])
            if wrong:
                fork.fail(describe(fork.cell.policy, doubt.hook, wrong, [f"layer {layer}"]))
            fork.doubts = []


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
