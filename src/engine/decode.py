"""Lanes on their way through a wave: what each is fed, what it takes, how it fails, and their order in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from src.engine.attention import RotateLayer
from src.engine.pool import LaneBatch, Pool
from src.engine.prefill import Cell, Fork
from src.engine.request import Generation, Request


class Lane:
    """A lane's way through a wave.

    Args:
        result: what is filled in as the lane goes.
        fork: the cut prompt it starts from.
        feed: tokens to be fed before anything is generated: the question (`prompt_scope=context`), and for a
            fidelity lane the reference answer.
        targets: for a fidelity lane, the reference token that should follow each fed token (-1: none).
        first_nll: for a fidelity lane, of the first reference token, where the prefill predicted it.
        full: for a fidelity lane, its counterpart with the full cache; None: itself.
    """

    def __init__(
        self,
        result: Generation,
        fork: Fork,
        feed: Sequence[int],
        targets: Sequence[int] | None = None,
        first_nll: float | None = None,
        full: Lane | None = None,
    ) -> None:
        self.result, self.fork, self.feed, self.targets = result, fork, feed, targets
        self.first_nll, self._full = first_nll, full
        self.start = self.position = fork.length
        self.done = targets is not None and not feed
        self.shared = False  # its policy failed in a question about all its lanes

    @property
    def generates(self) -> bool:
        """Whether it answers; a fidelity lane reads."""
        return self.targets is None

    @property
    def watched(self) -> bool:
        """Whether probes see it: a lane that answers somebody."""
        return self.targets is None and self.result.variant.asked

    @property
    def full(self) -> Lane:
        """What a fidelity lane is compared with."""
        return self._full or self

    @property
    def over(self) -> bool:
        """Nothing is left to do, also because the result's other lane failed."""
        return self.done or self.result.error is not None

    @property
    def target(self) -> int:
        """The reference token that should come next; -1: none."""
        return -1 if self.targets is None else self.targets[self.position - self.start]

    def next_input(self) -> int:
        fed = self.position - self.start
        return self.feed[fed] if fed < len(self.feed) else self.result.tokens[-1]

    def advance(self, token: int) -> None:
        """One step done; `token` is what the model would say next."""
        self.position += 1
        if self.position - self.start < len(self.feed):
            return
        if self.generates:
            self.take(token)
        else:
            self.done = True

    def fail(self, error: str, shared: bool = False) -> None:
        """Its policy broke its contract: nothing that the lane holds counts any more."""
        self.result.error, self.shared, self.done = error, shared, True

    def take(self, token: int) -> None:
        """A generated token."""
        self.result.tokens.append(token)
        if token in self.result.request.stop_ids:
            self.result.finish, self.done = "stop", True
        elif len(self.result.tokens) >= self.result.request.max_new_tokens:
            self.result.finish, self.done = "length", True


def heed(batch: LaneBatch, lanes: Sequence[Lane], doubted: Sequence[int] = ()) -> None:
    """Lanes whose policy raised, or broke its contract, fail; the others do not notice.

    Args:
        doubted: rows whose evictions in this step are wrong, as read.
    """
    for row, error, shared in batch.faults(doubted):
        lanes[row].fail(error, shared)


def failed(lane: Lane) -> Generation:
    """What a failed lane is answered with: the reason alone."""
    return Generation(lane.result.request, lane.result.variant, error=lane.result.error)


def arrange(lanes: list[Lane], rotate: RotateLayer) -> tuple[LaneBatch, list[Lane]]:
    """Pools of lanes that may hold equally many entries; the lanes in the order of the batch's rows."""
    groups: dict[object, dict[Cell, list[Lane]]] = {}
    for lane in lanes:
        groups.setdefault(lane.fork.pool_key(), {}).setdefault(lane.fork.cell, []).append(lane)
    ordered: list[Lane] = []
    pools = []
    for cells in groups.values():
        members = [lane for group in cells.values() for lane in group]
        pools.append(Pool([lane.fork for lane in members], len(ordered)))
        ordered += members
    return LaneBatch(pools, rotate), ordered


def choose(logits: Tensor, lanes: Sequence[tuple[Request, int]]) -> Tensor:
    """Greedy next tokens `(lanes,)`; -1 where logits are not numbers.

    Args:
        logits: `(lanes, vocabulary)`; changed where a stop token may not come yet.
        lanes: each lane's request and how many tokens it has generated.
    """
    for row, (request, generated) in enumerate(lanes):
        if generated < request.min_new_tokens:
            logits[row, list(request.stop_ids)] = -torch.inf
    best = logits.max(dim=-1)
    return torch.where(best.values.isfinite(), best.indices, -1)
