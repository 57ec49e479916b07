"""A prompt cut by a plan: other numbers of tokens for other layers and heads, some cut further when later layers come.

Cells whose layers and heads hold alike do not come here: they keep what their policy names (`src.engine.prefill`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.base import Policy, RankedPolicy
from src.kv.cache import LayerCache
from src.kv.contract import (
    Doubt,
    check_cache,
    check_counts,
    check_limit,
    check_plan,
    check_rank,
    check_start,
    check_total,
)
from src.kv.faults import ask
from src.kv.plan import Allotment, Plan
from src.kv.prompt import PromptAttention
from src.kv.ragged import RaggedCache
from src.kv.state import State


@dataclass(frozen=True)
class LayerHeld:
    """One layer, as its lanes begin."""

    cache: LayerCache
    state: State


class PlannedCut:
    """What one cell keeps of one prompt, by its allocator's plan.

    Args:
        policy: with an `allocate`.
        budget: entries per layer and KV head, on average.

    Attributes:
        peak_nbytes: the most bytes of keys and values of layers that could still shrink; 0: none could.

    Raises:
        Fault: the budget is too small for the allocator, or it raised, or gave no plan.
    """

    def __init__(self, policy: RankedPolicy, budget: int, prompt: PromptAttention) -> None:
        self.policy, self.layers = policy, prompt.layers
        self.allotment = allotment(policy, budget, prompt.length, prompt.layers, prompt.kv_heads)
        assert policy.allocate is not None
        self.plan: Plan = ask(policy, "allocate", None, policy.allocate.plan, self.allotment)
        least = policy.least_budget()
        self.told = ask(policy, "allocate", None, check_plan, self.plan, prompt.layers, least, prompt.length)
        self.revises = self.plan.revises
        self.open: list[LayerCut] = []  # layers that may still shrink
        self.held: list[LayerHeld] = []
        self.counts: list[list[int]] = []
        self.peak_nbytes = 0

    def add_layer(self, prompt: PromptAttention) -> list[Doubt]:
        """The next layer. What must still be looked at comes back.

        Raises:
            Fault: the policy, its allocator or its store raised, or broke its contract.
        """
        policy, layer, told = self.policy, prompt.layer, self.told[prompt.layer]
        prompt.doubts.clear()
        ranks = ask(policy, "rank_prompt", layer, self._rank, prompt)
        before = [*self.counts, [prompt.length] * prompt.kv_heads]
        given = ask(policy, "allocate", layer, self._divide, prompt, ranks, before)
        self.counts = [list(given.get(earlier, had)) for earlier, had in enumerate(before)]
        kept = best(ranks, self.counts[-1])
        state = ask(policy, "start", layer, remembered, policy, prompt, kept, told)
        if self.revises:
            self.open.append(LayerCut(prompt, kept, ranks, state, policy.store.last_queries if policy.store else 0))
            for earlier in given:
                self.open[earlier].shrink(self.counts[earlier])
        else:
            cache = ask(policy, "store", layer, hold, policy, prompt, kept, told)
            self.held.append(LayerHeld(cache, state))
        self.peak_nbytes = max(self.peak_nbytes, sum(cut.nbytes for cut in self.open))
        return [*prompt.doubts, enough(ranks, self.counts[-1])]

    def _rank(self, prompt: PromptAttention) -> Tensor:
        ranks = self.policy.rank_prompt(prompt, self.told[prompt.layer])
        return check_rank(ranks, (prompt.kv_heads, prompt.length), prompt.keys.device)

    def _divide(
        self, prompt: PromptAttention, ranks: Tensor, before: Sequence[Sequence[int]]
    ) -> Mapping[int, Sequence[int]]:
        return check_counts(self.plan.cut(prompt, ranks), before, self.revises)

    def finish(self) -> list[LayerHeld]:
        """All layers, once the last has come.

        Raises:
            Fault: the counts do not add up to the budget, or the store raised.
        """
        assert self.policy.allocate is not None
        if self.policy.allocate.exact:
            ask(self.policy, "allocate", None, check_total, self.counts, self.allotment.total)
        while self.open:  # one after the other: one is in memory twice
            cut = self.open.pop(0)
            cache = ask(self.policy, "store", cut.prompt.layer, cut.hold, self.policy, self.told[cut.prompt.layer])
            self.held.append(LayerHeld(cache, cut.state))
        return self.held


class LayerCut:
    """What is left of one layer while it may still shrink: exact, padded to its longest head.

    Args:
        kept: of every KV head, positions, ascending.
        ranks: what they are worth, `(kv_heads, n)` over the whole prompt.
        state: what the policy remembers about them, `(kv_heads, ..., longest)`.
        last_queries: how many of the prompt's stay for the store (`Store.last_queries`); None: all.
    """

    def __init__(
        self,
        prompt: PromptAttention,
        kept: Sequence[Tensor],
        ranks: Tensor,
        state: State,
        last_queries: int | None = 0,
    ) -> None:
        self.prompt, self.ranks, self.state = prompt, ranks, state
        self.queries = prompt.queries.shape[1] if last_queries is None else min(last_queries, prompt.queries.shape[1])
        self.positions = torch.arange(prompt.length, device=ranks.device).expand(prompt.kv_heads, -1)
        self._narrow(kept)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values while they are held like this."""
        return self.prompt.keys.nbytes + self.prompt.values.nbytes

    def shrink(self, counts: Sequence[int]) -> None:
        """Only so many of every head's tokens stay, those that are worth most."""
        if list(counts) != self.counts:
            kept = best(self.ranks, counts)
            self.state = State(
                {name: columns(tensor, padded(kept)) for name, tensor in self.state.slots.items()}, self.state.fixed
            )
            self._narrow(kept)
            clear(self.state, self.missing)

    def _narrow(self, kept: Sequence[Tensor]) -> None:
        index, prompt = padded(kept), self.prompt
        self.counts = [len(head) for head in kept]
        self.missing = absent(self.counts, index.device)
        keys, values = (rows(tensor, index) for tensor in (prompt.keys, prompt.values))
        queries = prompt.queries[:, prompt.queries.shape[1] - self.queries :].clone()  # the rest can go
        self.prompt = PromptAttention(queries, keys, values, prompt.scaling, prompt.layer, prompt.layers)
        self.ranks = self.ranks.gather(-1, index).masked_fill(self.missing, -torch.inf)
        self.positions = self.positions.gather(-1, index).masked_fill(self.missing, -1)

    def hold(self, policy: Policy, told: int) -> LayerCache:
        """The cache that the lanes decode with, held as the policy's store does."""
        kept = [torch.arange(count, device=self.positions.device) for count in self.counts]
        cache = hold(policy, self.prompt, kept, told)
        cache.positions = self.positions.to(torch.int32)[None].clone()
        return cache


def allotment(policy: Policy, budget: int, length: int, layers: int, kv_heads: int) -> Allotment:
    """What a policy's allocator has to divide. Raises Fault."""

    def found() -> Allotment:
        always, at_budget = policy.least_budget() - 1, policy.staying(min(budget, length))
        return Allotment(budget, length, layers, kv_heads, always, at_budget)

    return ask(policy, "staying", None, found)


def hold(policy: Policy, prompt: PromptAttention, kept: Sequence[Tensor], told: int) -> LayerCache:
    """One layer's cache. Heads that keep equally many stand in a rectangle, unless they do so by chance: lanes of one
    cell shall share a pool.

    A policy that evicts while decoding does so within what each head was given, whatever the layer was told.

    Raises:
        ContractError: the store's cache is none of the kept entries.
    """
    counts = [len(head) for head in kept]
    limit = check_limit(policy.limit(told, max(counts)), 0, None, not policy.evicts_while_decoding)
    if limit is not None:
        limit = max(counts)
    by_head = policy.allocate is not None and policy.allocate.by_head
    if len(set(counts)) == 1 and not by_head:
        cache = policy.make_cache(prompt, torch.stack(list(kept)), limit)
    elif policy.store is not None:
        cache = policy.store.hold(prompt, kept, limit)
    else:
        cache = RaggedCache.from_prompt(prompt.keys, prompt.values, kept, limit)
    check_cache(cache, counts, limit)
    return cache


def remembered(policy: Policy, prompt: PromptAttention, kept: Sequence[Tensor], told: int) -> State:
    """What the policy remembers about the kept tokens, padded to the longest head."""
    index = padded(kept)
    state = policy.start(prompt, index, told)
    check_start(state, *index.shape)
    clear(state, absent([len(head) for head in kept], index.device))
    return state


def best(ranks: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The tokens of every head that are worth most, ascending, `(count,)` each; of equal ones the first.

    Args:
        ranks: `(kv_heads, n)`.
    """
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    return [order[head, :count].sort().values for head, count in enumerate(counts)]


def padded(kept: Sequence[Tensor]) -> Tensor:
    """`(kv_heads, k)`, k of the longest; shorter ones are filled with a position that is there to be read."""
    longest = max(len(head) for head in kept)
    return torch.stack([torch.cat([head, head.new_zeros(longest - len(head))]) for head in kept])


def absent(counts: Sequence[int], device: torch.device) -> Tensor:
    """True past every head's count, `(kv_heads, longest)`."""
    held = torch.tensor(list(counts), device=device)
    return torch.arange(max(counts), device=device) >= held[:, None]


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """`(kv_heads, n, head_dim)` at `(kv_heads, k)`."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def columns(tensor: Tensor, index: Tensor) -> Tensor:
    """`(kv_heads, ..., n)` at `(kv_heads, k)`."""
    at = index.view(index.shape[0], *(1,) * (tensor.dim() - 2), -1)
    return tensor.gather(-1, at.expand(*tensor.shape[:-1], -1))


def clear(state: State, missing: Tensor) -> None:
    """Nothing is remembered about a token that is not there; `missing`: `(kv_heads, k)`."""
    if missing.shape[0] > 1:  # one head lacks nothing
        for name, tensor in state.slots.items():
            where = missing.view(missing.shape[0], *(1,) * (tensor.dim() - 2), -1)
            state.slots[name] = tensor.masked_fill(where, 0)


def enough(ranks: Tensor, counts: Sequence[int]) -> Doubt:
    """Does every head get as many entries as tokens must stay (infinity)?"""

    def judge(must_stay: Sequence[float]) -> str:
        for head, (count, least) in enumerate(zip(counts, must_stay, strict=True)):
            if count < least:
                return f"gave {count} entries to KV head {head}; expected {int(least)} or more, which always stay"
        return ""

    return Doubt("allocate", (ranks == torch.inf).sum(dim=-1).double(), judge)
