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
import torch.nn.functional as F
from torch import Tensor

from policies.base import Policy, State
from src.cache import DecodeStep, LayerCache
from src.prompt_attention import PromptAttention
from src.states import settle, stack_states

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotate = Callable[[Tensor, Tensor], Tensor]
RotateLayer = Callable[[Tensor, Tensor, int], Tensor]  # the last one: which layer's vectors they are


@dataclass(frozen=True)
class Cell:
    """One policy at one budget (entries per layer and KV head; resolved, never a fraction)."""

    policy: Policy
    budget: int


class Fork:
    """One prompt under one cell: what is left of it in every layer."""

    def __init__(self, cell: Cell, length: int) -> None:
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
        policy, budget = self.cell.policy, self.cell.budget
        kept = policy.keep_prompt(prompt, budget)
        self.caches.append(policy.make_cache(prompt, kept, policy.limit(budget, kept.shape[-1])))
        self.states.append(policy.start(prompt, kept, budget))
        self._measured.append(policy.prompt_measures(prompt, budget))
        self.full_nbytes += prompt.keys.nbytes + prompt.values.nbytes

    def measures(self) -> dict[str, Tensor]:
        """`Policy.prompt_measures` of all layers, stacked."""
        return {name: torch.stack([layer[name] for layer in self._measured]) for name in self._measured[0]}

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


class Member:
    """Lanes of one cell inside a pool: rows `start..stop` of it, and the policy's state per layer."""

    def __init__(self, cell: Cell, start: int, stop: int, states: list[State]) -> None:
        self.cell, self.start, self.stop, self.states = cell, start, stop, states


class Pool:
    """Lanes that may hold equally many entries: one `LayerCache` per layer, one attention call for all.

    Args:
        forks: the lanes, those of equal cells next to each other.
        rows: where the pool's first lane stands in the batch.
    """

    def __init__(self, forks: Sequence[Fork], rows: int) -> None:
        self.row = rows
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
            states = [
                stack_states([f.states[layer] for f in forks[start:stop]], self.caches[layer].slots) for layer in layers
            ]
            self.members.append(Member(forks[start].cell, start, stop, states))
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
            step = DecodeStep(
                logits=logits[rows],
                weights=logits[rows],  # replaced below, once all policies had their word on the logits
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
            m.cell.policy.adjust_logits(step)
            steps.append(step)
        weights = logits.softmax(dim=-1)
        for m, step in zip(self.members, steps, strict=True):
            step.weights = weights[m.start : m.stop]
            state = m.states[layer]
            if added:
                state.slots = {name: F.pad(tensor, (0, added)) for name, tensor in state.slots.items()}
            m.cell.policy.adjust_weights(step, state)
        out = cache.mix(weights, value)
        victims = []
        evicting = room is not None and max(cache.used) >= room
        for m, step in zip(self.members, steps, strict=True):
            state = m.states[layer]
            m.cell.policy.observe(step, state)
            kept = m.cell.policy.prune(step, state)
            if kept is not None:  # the member has the pool to itself
                cache.keep(kept)
                state.keep(kept)
            elif evicting:
                victims.append(m.cell.policy.evict(step, state))
        slot = cache.place(torch.cat(victims) if victims else None, room)
        for m in self.members:
            settle(m.states[layer], slot[m.start : m.stop])
        cache.write(slot, key, value, position, room, any(m.cell.policy.may_refuse for m in self.members))
        return out

    def room(self, layer: int, t: int) -> int | None:
        """Entries that the layer's cache may hold after the step; None: any number."""
        limit, policy = self.caches[layer].limit, self.members[0].cell.policy
        return policy.room(t, limit) if limit is not None and policy.own_pool else limit

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
                at = torch.tensor(rows, device=device)
                for state in m.states:
                    state.slots = {name: tensor[at] for name, tensor in state.slots.items()}
                    state.fixed = {name: tensor[at] for name, tensor in state.fixed.items()}
                members.append(Member(m.cell, start, start + len(rows), m.states))
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
        """What a row's policy has to say about it."""
        member, lane = self._member(row)
        return member.cell.policy.measures(member.states, lane)

    def attended(self, row: int) -> list[Tensor] | None:
        """Per layer, the share of query heads that attended to each cached token of a row at the last step."""
        member, lane = self._member(row)
        shares = [member.cell.policy.attended(state) for state in member.states]
        return [share[lane, :, :-1] for share in shares if share is not None] or None

    def picks(self, row: int) -> list[Tensor]:
        """Per layer, how often each slot of a row was attended to, `(kv_heads, slots)`; empty: always."""
        member, lane = self._member(row)
        counts = [member.cell.policy.picks(state) for state in member.states]
        return [count[lane, :, :-1] for count in counts if count is not None]

    def locate(self, row: int) -> tuple[list[LayerCache], int]:
        """The caches that hold a row of the batch, and the lane's place in them."""
        pool = next(p for p in self.pools if p.row <= row < p.row + p.lanes)
        return pool.caches, row - pool.row

    def _member(self, row: int) -> tuple[Member, int]:
        """The member that a row of the batch belongs to, and the lane's place in its states."""
        pool = next(p for p in self.pools if p.row <= row < p.row + p.lanes)
        member = next(m for m in pool.members if m.start <= row - pool.row < m.stop)
        return member, row - pool.row - member.start

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
