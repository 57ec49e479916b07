"""A prompt's one forward pass, and what every cell keeps of each layer right after its attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.base import Policy, RankedPolicy
from policies.full import Full
from src.engine.attention import Attention
from src.engine.choices import no_choices
from src.engine.cut import PlannedCut
from src.kv.cache import LayerCache
from src.kv.contract import Doubt, check_cache, check_kept, check_limit, check_measures, check_start
from src.kv.faults import Answer, Fault, ask, describe
from src.kv.prompt import PromptAttention
from src.kv.sequel import Sequel
from src.kv.state import State


@dataclass(frozen=True)
class Cell:
    """One policy at one budget (entries per layer and KV head; resolved, never a fraction)."""

    policy: Policy
    budget: int
    by_layer: tuple[int, ...] = ()  # what the policy is told of each layer, where an allocator says so

    def told(self, layer: int) -> int:
        """Entries per KV head that the policy is told about a layer."""
        return self.by_layer[layer] if self.by_layer else self.budget

    @property
    def full(self) -> bool:
        """Whether this is the full cache, which others are compared with; a user's subclass of it may cut."""
        return type(self.policy) is Full and self.policy.store is None and self.policy.read is None

    @property
    def changes_weights(self) -> bool:
        """Whether the policy has a hand in the attention itself, and may be to blame where it gives no numbers."""
        hooks = ("adjust_logits", "make_cache")
        own = any(getattr(type(self.policy), hook) is not getattr(Policy, hook) for hook in hooks)
        return own or self.policy.reader is not None


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
        self.tallies: list[State] = []  # where a reader chooses
        self.full_nbytes = 0  # of the whole prompt's keys and values, as the model computes them
        self.planned: PlannedCut | None = None  # where layers and heads differ
        self._measured: list[dict[str, Tensor]] = []  # what the policy has to say about each layer's prompt

    def pool_key(self) -> object:
        """Lanes with equal keys are attended in one call: the same limits, or about the same sizes and growing."""
        policy = self.cell.policy
        return tuple(cache.goes_with() for cache in self.caches), policy.store, self.cell if policy.own_pool else None

    def add_layer(self, prompt: PromptAttention) -> None:
        if self.error:
            return
        try:
            if prompt.layer == 0:
                self._plan(prompt)
            if self.planned is None:
                self._cut(prompt)
            else:
                self._cut_by_plan(self.planned, prompt)
        except Fault as fault:
            self.fail(str(fault))
        self.full_nbytes += prompt.keys.nbytes + prompt.values.nbytes

    def _cut(self, prompt: PromptAttention) -> None:
        """Everything that the policy is asked about one layer of the prompt, in this order.

        Raises:
            Fault: it raised, or broke its contract.
        """
        policy, budget, heads, length = self.cell.policy, self.cell.budget, prompt.kv_heads, prompt.length

        def question(hook: str, asked: Callable[[], Answer]) -> Answer:
            return ask(policy, hook, prompt.layer, asked)

        def keep() -> tuple[Tensor, Doubt]:
            return check_kept(policy.keep_prompt(prompt, budget), heads, length, most, prompt.keys.device)

        def limits() -> int | None:
            bound = budget if policy.uses_budget and not policy.uses_decode_budget else None
            return check_limit(policy.limit(budget, entries), entries, bound, not policy.evicts_while_decoding)

        prompt.doubts.clear()
        most = question("prompt_limit", lambda: min(policy.prompt_limit(budget, length), length))
        kept, doubt = question("keep_prompt", keep)
        self.doubts += [(prompt.layer, d) for d in (*prompt.doubts, doubt)]
        entries = kept.shape[1]
        limit = question("limit", limits)
        cache = question("make_cache", lambda: policy.make_cache(prompt, kept, limit))
        question("make_cache", lambda: check_cache(cache, [entries] * heads, limit))
        state = question("start", lambda: policy.start(prompt, kept, budget))
        question("start", lambda: check_start(state, heads, entries))
        measured = question("prompt_measures", lambda: check_measures(policy.prompt_measures(prompt, budget), Tensor))
        self._hold(cache, state)
        self._measured.append(measured)

    def _hold(self, cache: LayerCache, state: State) -> None:
        self.caches.append(cache)
        self.states.append(state)
        if self.cell.policy.reader is not None:
            self.tallies.append(no_choices(cache, self.length))

    def _plan(self, prompt: PromptAttention) -> None:
        """Who may hold how much, unless everything fits. Raises Fault."""
        policy, budget = self.cell.policy, self.cell.budget
        if not isinstance(policy, RankedPolicy) or policy.allocate is None:
            return
        if prompt.length > (budget if policy.allocate.uses_budget else policy.least_budget() - 1):
            self.planned = PlannedCut(policy, budget, prompt)
            self.cell = replace(self.cell, by_layer=tuple(self.planned.told))

    def _cut_by_plan(self, planned: PlannedCut, prompt: PromptAttention) -> None:
        """The same where an allocator divides the budget; the caches come with the last layer. Raises Fault."""
        policy, layer = self.cell.policy, prompt.layer
        self.doubts += [(layer, doubt) for doubt in planned.add_layer(prompt)]
        told = self.cell.told(layer)
        measured = ask(policy, "prompt_measures", layer, policy.prompt_measures, prompt, told)
        self._measured.append(ask(policy, "prompt_measures", layer, check_measures, measured, Tensor))
        if layer == prompt.layers - 1:
            for held in planned.finish():
                self._hold(held.cache, held.state)

    def fail(self, error: str) -> None:
        """Its policy is asked nothing more, and its caches go."""
        self.error, self.caches, self.states, self._measured = error, [], [], []
        self.planned, self.tallies = None, []
        self.doubts = []

    def measures(self) -> dict[str, Tensor]:
        """`Policy.prompt_measures` of all layers, stacked.

        Raises:
            Fault: the layers' do not agree.
        """

        def stacked() -> dict[str, Tensor]:
            if self.cell.by_layer:
                names = dict.fromkeys(name for layer in self._measured for name in layer)
                return {name: stacked_unequal([layer.get(name) for layer in self._measured]) for name in names}
            return {name: torch.stack([layer[name] for layer in self._measured]) for name in self._measured[0]}

        return ask(self.cell.policy, "prompt_measures", None, stacked)

    def take_layer(self) -> LayerCache:
        """Hands the first layer's cache over that it still has; whoever takes it holds it alone."""
        return self.caches.pop(0)

    def take_states(self) -> list[State]:
        """Hands the policy's states over, a list over layers."""
        states, self.states = self.states, []
        return states

    def take_tallies(self) -> list[State]:
        """Hands over what a reader's choices will be counted in, a list over layers; empty without a reader."""
        tallies, self.tallies = self.tallies, []
        return tallies

    def take_doubts(self) -> list[tuple[int, Doubt]]:
        """Hands over what must still be looked at."""
        doubts, self.doubts = self.doubts, []
        return doubts

    def nbytes(self) -> int:
        """Exact bytes of keys and values."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def cutting_nbytes(self) -> int:
        """The most bytes of keys and values while layers could still shrink; 0: none could."""
        return self.planned.peak_nbytes if self.planned else 0

    def nbytes_by_device(self) -> dict[str, int]:
        """`nbytes` by where they lie."""
        total: Counter[str] = Counter()
        for cache in self.caches:
            total.update(cache.nbytes_by_device())
        return dict(total)

    def bookkeeping_nbytes(self) -> int:
        """Bytes kept beside keys and values: positions, the policy's state, and the tally of a reader."""
        positions = sum(cache.positions.untyped_storage().nbytes() for cache in self.caches)
        return positions + sum(state.nbytes() for state in (*self.states, *self.tallies))


def stacked_unequal(layers: Sequence[Tensor | None]) -> Tensor:
    """Layers' figures `(..., k)` stacked; NaN for what one has not, because of what it was told (other windows leave
    other numbers of tokens to compete, in a layer that keeps its whole prompt none)."""
    there = [layer for layer in layers if layer is not None]
    if len(there) == len(layers) and len({layer.shape for layer in there}) == 1:
        return torch.stack(there)
    longest = max(there, key=lambda layer: layer.shape[-1:])
    blank = torch.full_like(longest, torch.nan, dtype=torch.promote_types(longest.dtype, torch.float32))
    rows = [blank if layer is None else layer.to(blank.dtype) for layer in layers]
    if not blank.dim():
        return torch.stack(rows)
    return torch.stack([F.pad(row, (0, blank.shape[-1] - row.shape[-1]), value=torch.nan) for row in rows])


class Prefill:
    """A prompt's forward pass: full causal attention, and every cell's cut of a layer as soon as its keys are there.

    Args:
        seen: per layer, for policies that had something read before: see `src.engine.sequels`.
    """

    def __init__(
        self, cells: Sequence[Cell], layers: int, length: int, seen: Sequence[Mapping[Sequel, Tensor]] = ()
    ) -> None:
        self.forks = [Fork(cell, length) for cell in cells]
        self.layers, self.longest, self.seen = layers, length, seen

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """All prompt tokens at once: `(1, heads, n, head_dim)` in, `(1, n, heads, head_dim)` out."""
        seen = self.seen[layer] if self.seen else None
        prompt = PromptAttention(query[0], key[0], value[0], scaling, layer, self.layers, seen)
        for fork in self.forks:
            fork.add_layer(prompt)
        return attention(query, key, value)

    def settle(self) -> None:
        """Read what the policies' positions and scores came to, all at once: the host waits for the device."""
        open_ = [(fork, layer, doubt) for fork in self.forks for layer, doubt in fork.take_doubts()]
        found = torch.cat([doubt.numbers for _, _, doubt in open_]).tolist() if open_ else []
        end = 0
        for fork, layer, doubt in open_:
            start, end = end, end + len(doubt.numbers)
            wrong = "" if fork.error else doubt.judge(found[start:end])
            if wrong:
                fork.fail(describe(fork.cell.policy, doubt.hook, wrong, [f"layer {layer}"]))
