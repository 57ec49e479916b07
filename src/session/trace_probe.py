"""What is cached, or attended to, while the output grows (`kept_over_time=N`), noted by a probe of the engine."""

from __future__ import annotations

from src.engine.probes import LaneView, Probe
from src.engine.request import Generation, Request, Variant
from src.retention.trace import BINS, Trace


class TraceProbe(Probe):
    """Keeps a `Trace` of every lane, until it is taken.

    Args:
        every: output tokens between two looks.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.traces: dict[tuple[Request, Variant], Trace] = {}

    def on_cut(self, generation: Generation) -> None:
        """A trace begins; another try, after memory ran out, starts afresh."""
        request, variant = generation.request, generation.variant
        width = -(-(len(request.ids) + request.max_new_tokens) // BINS)
        trace = self.traces[request, variant] = Trace(request.first, width, self.every)
        if variant.policy.reader is None:
            trace.note(0, generation.kept_prompt)

    def on_step(self, lane: LaneView) -> None:
        if lane.t % self.every == 0:
            trace = self.traces[lane.generation.request, lane.generation.variant]
            trace.note(lane.t, lane.kept, lane.attended())

    def take(self, result: Generation) -> Trace | None:
        """A finished lane's, once; None where its prompt was not cut."""
        return self.traces.pop((result.request, result.variant), None)
