"""An engine that notes what is cached, or attended to, while the output grows (`kept_over_time=N`)."""

from __future__ import annotations

from typing import Any

from src.engine.decode import Lane
from src.engine.engine import Engine
from src.engine.fidelity import REFERENCE
from src.engine.pool import LaneBatch
from src.engine.request import Generation
from src.kv.contract import ContractError
from src.retention.trace import BINS, Trace


class TracingEngine(Engine):
    """An engine that keeps a `Trace` of every lane it has not handed out yet.

    Args:
        every: output tokens between two looks.
    """

    def __init__(self, model: Any, max_lanes: int, every: int) -> None:
        super().__init__(model, max_lanes)
        self.every = every
        self._traces: dict[tuple[str, int], tuple[Generation, Trace]] = {}

    def _step(self, batch: LaneBatch, lanes: list[Lane], *rest: Any) -> None:
        super()._step(batch, lanes, *rest)
        if batch.t % self.every:
            return
        for row, lane in enumerate(lanes):
            if lane.targets is None and lane.result.variant is not REFERENCE and not lane.result.error:
                caches, at = batch.locate(row)
                kept = [c.positions[at, :, : c.used[at]] for c in caches]
                try:
                    chosen, trace = batch.attended(row), self._of(lane.result)
                except ContractError as error:
                    lane.fail(str(error))
                    continue
                if chosen is not None:
                    chosen = [share[:, : layer.shape[1]] for share, layer in zip(chosen, kept, strict=True)]
                trace.note(batch.t, kept, chosen)

    def trace(self, result: Generation) -> Trace:
        """A finished or failed lane's, once."""
        trace = self._of(result)
        del self._traces[result.request.name, id(result.variant)]
        return trace

    def _of(self, result: Generation) -> Trace:
        request, key = result.request, (result.request.name, id(result.variant))
        found = self._traces.get(key)
        if found is None or found[0] is not result:  # another try, after memory ran out, starts afresh
            width = -(-(len(request.ids) + request.max_new_tokens) // BINS)
            scope = len(request.ids) if request.context_tokens is None else request.context_tokens
            found = self._traces[key] = (result, Trace(scope, width, self.every))
            if result.kept_prompt and not result.variant.policy.chooses:
                found[1].note(0, result.kept_prompt)
        return found[1]
