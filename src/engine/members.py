"""The lanes of one cell within a pool, and every question that its policy is asked while they decode.

A policy that raises or breaks its contract (`src.kv.contract`) must not cost the others their step, which is half-way
through the model by then: it is asked nothing more, its lanes overwrite their first slot for the layers that are
left, and the engine takes them out of the batch at the step's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from policies.base import Policy
from src.engine.choices import Choices
from src.kv.cache import LayerCache
from src.kv.contract import (
    check_choice,
    check_evict,
    check_measures,
    check_prune,
    check_rank,
    check_room,
    check_state,
)
from src.kv.faults import Answer, Fault, ask
from src.kv.state import State, settle, stack_states
from src.kv.step import DecodeStep

if TYPE_CHECKING:
    from src.engine.prefill import Cell


class Member:
    """Lanes of one cell inside a pool: rows `start..stop` of it, and the policy's state per layer.

    Attributes:
        choices: what its lanes attended to; None: everything, always.
        error: what its policy did wrong; empty if nothing.
    """

    def __init__(
        self, cell: Cell, start: int, stop: int, states: list[State], choices: Choices | None = None, error: str = ""
    ) -> None:
        self.cell, self.start, self.stop, self.states, self.error = cell, start, stop, states, error
        self.choices, self.reader = choices, cell.policy.reader
        # Hooks that a policy has left as they are need not be asked at every layer of every step.
        own = type(cell.policy)
        self.adjusts_logits = own.adjust_logits is not Policy.adjust_logits
        self.observes = own.observe is not Policy.observe
        self.prunes = own.prune is not Policy.prune
        self.ranks = defined_last(own, "rank", "evict")

    @classmethod
    def of(
        cls,
        cell: Cell,
        start: int,
        states: Sequence[list[State]],
        tallies: Sequence[list[State]],
        slots: Sequence[int],
    ) -> Member:
        """From the lanes' own states and tallies (a list over layers each), for caches with so many slots."""
        member = cls(cell, start, start + len(states), [])
        if member.reader is not None:
            member.choices = Choices(
                [stack_states([lane[layer] for lane in tallies], width) for layer, width in enumerate(slots)]
            )
        for layer, width in enumerate(slots):
            stacked = member._ask("start", layer, stack_states, [lane[layer] for lane in states], width)
            if stacked is None:
                break
            member.states.append(stacked)
        return member

    def _ask(self, hook: str, layer: int, question: Callable[..., Answer], *arguments: Any) -> Answer | None:
        """What the policy answers; None once it has broken its contract: it is asked nothing more."""
        if self.error:
            return None
        try:
            return ask(self.cell.policy, hook, layer, question, *arguments)
        except Fault as fault:
            self.error = str(fault)
            return None

    def room(self, layer: int, t: int, limit: int) -> int:
        """`Policy.room`, for policies that have a pool to themselves."""
        return self._ask("room", layer, lambda: check_room(self.cell.policy.room(t, limit), limit)) or limit

    def adjust_logits(self, step: DecodeStep) -> None:
        if self.adjusts_logits:
            self._ask("adjust_logits", step.layer, self.cell.policy.adjust_logits, step)

    def read(self, step: DecodeStep, added: int) -> None:
        """Leave in `step.weights` and `step.logits` what the policy's reader chooses.

        Args:
            added: slots that the cache has grown by since the last step.
        """
        if self.error:
            return
        if added:
            for state in self._by_slot(step.layer):
                state.grow(added)
        if self.reader is not None:
            self._ask("read", step.layer, self._read, step)

    def _read(self, step: DecodeStep) -> None:
        reader, choices, held = self.reader, self.choices, step.logits > -torch.inf
        assert reader is not None and choices is not None
        chosen = reader.choose(step)
        if chosen is not None:
            chosen = check_choice(chosen, held.shape, held.device) & held
            step.weights.masked_fill_(~chosen, 0)
            step.logits.masked_fill_(~chosen, -torch.inf)  # for policies that make weights of their own
            if reader.renormalise:
                step.weights.div_(step.weights.sum(-1, keepdim=True))
        choices.note(step.layer, held if chosen is None else chosen, held)

    def _by_slot(self, layer: int) -> list[State]:
        """What moves with the slots."""
        return [self.states[layer], *([self.choices.layers[layer]] if self.choices else [])]

    def observe(self, step: DecodeStep, room: int | None) -> Tensor | None:
        """`Policy.observe`, and what `Policy.prune` keeps of the cached slots; None: all."""
        if self.error:
            return None
        policy, state = self.cell.policy, self.states[step.layer]
        if self.observes:
            self._ask("observe", step.layer, policy.observe, step, state)
        if not self.prunes:
            return None

        return self._ask("prune", step.layer, self._prune, step, state, room)

    def _prune(self, step: DecodeStep, state: State, room: int | None) -> Tensor | None:
        kept = self.cell.policy.prune(step, state)
        if kept is None:
            return None
        lanes, kv_heads, slots = step.positions.shape
        most = slots if room is None else min(slots, room - 1)
        return check_prune(kept, lanes, kv_heads, most, self.cell.policy.own_pool, step.positions.device)

    def rank(self, step: DecodeStep) -> Tensor:
        """`Policy.rank`, `(lanes, kv_heads, slots)`, or one column more where it may refuse."""
        ranks = self._ask("rank", step.layer, self._rank, step)
        return torch.zeros(self._rank_shape(step), device=step.positions.device) if ranks is None else ranks

    def _rank(self, step: DecodeStep) -> Tensor:
        ranks = self.cell.policy.rank(step, self.states[step.layer])
        return check_rank(ranks, self._rank_shape(step), step.positions.device)

    def _rank_shape(self, step: DecodeStep) -> tuple[int, int, int]:
        lanes, kv_heads, slots = step.positions.shape
        return lanes, kv_heads, slots + self.cell.policy.may_refuse

    def evict(self, step: DecodeStep) -> Tensor:
        """The slots that the policy names, or those of its lowest ranks, `(lanes, kv_heads)`; any if it went wrong."""
        if self.ranks:
            lowest = self.rank(step).min(dim=-1)
            return torch.where(lowest.values < torch.inf, lowest.indices, -1)
        victims = self._ask("evict", step.layer, self._evict, step)
        return step.positions.new_zeros(step.positions.shape[:2]) if victims is None else victims

    def _evict(self, step: DecodeStep) -> Tensor:
        (lanes, kv_heads, _), device = step.positions.shape, step.positions.device
        return check_evict(self.cell.policy.evict(step, self.states[step.layer]), lanes, kv_heads, device)

    def settle(self, layer: int, slot: Tensor, slots: int) -> None:
        """Move the incoming token's column to its slot, `(pool's lanes, kv_heads)`; the state's shapes are checked."""
        if self.choices is not None and not self.error:
            self.choices.settle(layer, slot[self.start : self.stop])
        if self.error or not (self.states[layer].slots or self.states[layer].fixed):
            return
        self._ask("observe", layer, self._settle, layer, slot, slots)

    def _settle(self, layer: int, slot: Tensor, slots: int) -> None:
        state = self.states[layer]
        check_state(state.slots, state.fixed, (self.stop - self.start, slot.shape[1], slots + 1))
        settle(state, slot[self.start : self.stop])

    def keep(self, layer: int, kept: Tensor) -> None:
        """Only these slots are left, `(lanes, kv_heads, k)`."""
        for state in self._by_slot(layer):
            state.keep(kept)

    def select(self, rows: Sequence[int], start: int, at: Tensor) -> Member:
        """Only these of the lanes; `at`: the same, where kernels can read it."""
        for state in self.states:
            state.select(at)
        if self.choices is not None:
            self.choices.select(at)
        return Member(self.cell, start, start + len(rows), self.states, self.choices, self.error)

    def measures(self, lane: int, caches: Sequence[LayerCache]) -> dict[str, Any]:
        """`Policy.measures` of one lane, and those of what it attended to. Fault where the policy cannot say."""
        policy = self.cell.policy
        found = ask(policy, "measures", None, lambda: check_measures(policy.measures(self.states, lane)))
        if self.choices is None:
            return found
        return found | self.choices.measures(lane, [cache.positions[self.start + lane] for cache in caches])


def defined_last(kind: type, one: str, other: str) -> bool:
    """Whether a class, or the nearest of its bases that gives either method, gives this one."""
    return next(one in vars(base) for base in kind.__mro__ if one in vars(base) or other in vars(base))
