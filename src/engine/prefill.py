"""A prompt's one forward pass, and what every cell keeps of each layer right after its attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.base import Policy
from src.engine.attention import Attention
from src.kv.cache import LayerCache
from src.kv.contract import (
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
from src.kv.prompt import PromptAttention
from src.kv.state import State


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
        foreseen: per layer, for policies that look ahead: see `src.engine.foresight`.
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
