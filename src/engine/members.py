"""The lanes of one cell within a pool, and every question that its policy is asked while they decode.

A policy that raises or breaks its contract (`src.kv.contract`) must not cost the others their step, which is half-way
through the model by then: it is asked nothing more, its lanes overwrite their first slot for the layers that are
left, and the engine takes them out of the batch at the step's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.kv.cache import LayerCache
from src.kv.contract import (
    RAISED,
    ContractError,
    beyond_policy,
    check_by_slot,
    check_evict,
    check_measures,
    check_prune,
    check_room,
    check_state,
    fault,
)
from src.kv.state import State, settle, stack_states
from src.kv.step import DecodeStep

if TYPE_CHECKING:
    from src.engine.prefill import Cell


class Member:
    """Lanes of one cell inside a pool: rows `start..stop` of it, and the policy's state per layer.

    Attributes:
        error: what its policy did wrong; empty if nothing.
    """

    def __init__(self, cell: Cell, start: int, stop: int, states: list[State], error: str = "") -> None:
        self.cell, self.start, self.stop, self.states, self.error = cell, start, stop, states, error

    @classmethod
    def of(cls, cell: Cell, start: int, states: Sequence[list[State]], slots: Sequence[int]) -> Member:
        """From the lanes' own states (a list over layers each), for caches with so many slots."""
        member = cls(cell, start, start + len(states), [])
        for layer, width in enumerate(slots):
            try:
                member.states.append(stack_states([lane[layer] for lane in states], width))
            except RAISED as error:
                if beyond_policy(error):
                    raise
                member._fail("start", layer, error)
                break
        return member

    def _fail(self, hook: str, layer: int | None, error: BaseException) -> None:
        self.error = fault(self.cell.policy, hook, layer, error)

    def room(self, layer: int, t: int, limit: int) -> int:
        """`Policy.room`, for policies that have a pool to themselves."""
        try:
            return limit if self.error else check_room(self.cell.policy.room(t, limit), limit)
        except RAISED as error:
            if beyond_policy(error):
                raise
            self._fail("room", layer, error)
            return limit

    def adjust_logits(self, step: DecodeStep) -> None:
        if self.error:
            return
        try:
            self.cell.policy.adjust_logits(step)
        except RAISED as error:
            if beyond_policy(error):
                raise
            self._fail("adjust_logits", step.layer, error)

    def adjust_weights(self, step: DecodeStep, added: int) -> None:
        """`added`: slots that the cache has grown by since the last step."""
        if self.error:
            return
        state = self.states[step.layer]
        if added:
            state.slots = {name: F.pad(tensor, (0, added)) for name, tensor in state.slots.items()}
        try:
            self.cell.policy.adjust_weights(step, state)
        except RAISED as error:
            if beyond_policy(error):
                raise
            self._fail("adjust_weights", step.layer, error)

    def observe(self, step: DecodeStep, room: int | None) -> Tensor | None:
        """`Policy.observe`, and what `Policy.prune` keeps of the cached slots; None: all."""
        if self.error:
            return None
        policy, state, hook = self.cell.policy, self.states[step.layer], "observe"
        try:
            policy.observe(step, state)
            hook = "prune"
            kept = policy.prune(step, state)
            if kept is not None:
                lanes, kv_heads, slots = step.positions.shape
                most = slots if room is None else min(slots, room - 1)
                kept = check_prune(kept, lanes, kv_heads, most, policy.own_pool, step.positions.device)
            return kept
        except RAISED as error:
            if beyond_policy(error):
                raise
            self._fail(hook, step.layer, error)
            return None

    def evict(self, step: DecodeStep) -> Tensor:
        """`Policy.evict`'s slots, `(lanes, kv_heads)`."""
        lanes, kv_heads, _ = step.positions.shape
        if not self.error:
            try:
                victims = self.cell.policy.evict(step, self.states[step.layer])
                return check_evict(victims, lanes, kv_heads, step.positions.device)
            except RAISED as error:
                if beyond_policy(error):
                    raise
                self._fail("evict", step.layer, error)
        return torch.zeros(lanes, kv_heads, dtype=torch.long, device=step.positions.device)

    def settle(self, layer: int, slot: Tensor, slots: int) -> None:
        """Move the incoming token's column to its slot, `(pool's lanes, kv_heads)`; the state's shapes are checked."""
        if self.error:
            return
        state = self.states[layer]
        try:
            check_state(state.slots, state.fixed, (self.stop - self.start, slot.shape[1], slots + 1))
            settle(state, slot[self.start : self.stop])
        except RAISED as error:
            if beyond_policy(error):
                raise
            self._fail("observe", layer, error)

    def select(self, rows: Sequence[int], start: int, at: Tensor) -> Member:
        """Only these of the lanes; `at`: the same, where kernels can read it."""
        for state in self.states:
            state.slots = {name: tensor[at] for name, tensor in state.slots.items()}
            state.fixed = {name: tensor[at] for name, tensor in state.fixed.items()}
        return Member(self.cell, start, start + len(rows), self.states, self.error)

    # What is asked for the record. A fault here is raised as one line.

    def measures(self, lane: int) -> dict[str, Any]:
        """`Policy.measures`."""
        try:
            return check_measures(self.cell.policy.measures(self.states, lane))
        except RAISED as error:
            if beyond_policy(error):
                raise
            raise ContractError(fault(self.cell.policy, "measures", None, error)) from None

    def attended(self, caches: Sequence[LayerCache], lane: int) -> list[Tensor]:
        """`Policy.attended` per layer, of one lane: `(kv_heads, slots)`; empty: everything."""
        return self._by_slot("attended", caches, lane)

    def picks(self, caches: Sequence[LayerCache], lane: int) -> list[Tensor]:
        """`Policy.picks` per layer, of one lane: `(kv_heads, slots)`; empty: always."""
        return self._by_slot("picks", caches, lane)

    def _by_slot(self, hook: str, caches: Sequence[LayerCache], lane: int) -> list[Tensor]:
        try:
            shares = [getattr(self.cell.policy, hook)(state) for state in self.states]
            if all(share is None for share in shares):
                return []
            for share, cache in zip(shares, caches, strict=True):
                check_by_slot(share, (self.stop - self.start, cache.positions.shape[1], cache.slots + 1))
            return [share[lane, :, :-1] for share in shares]
        except RAISED as error:
            if beyond_policy(error):
                raise
            raise ContractError(fault(self.cell.policy, hook, None, error)) from None
