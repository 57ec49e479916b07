"""One probe for all tests that look at lanes while they are decoded, and a model's logits step by step."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from src.engine.probes import LaneView, Probe
from src.engine.request import Generation
from tests.support.naive import Kept


class Watch(Probe):
    """Notes what every lane that answers has cached after its prompt was cut and after each step.

    Args:
        look: is shown every lane after every step.
    """

    def __init__(self, look: Callable[[LaneView], object] = lambda lane: None) -> None:
        self.look = look
        self.kept: dict[Generation, list[Kept]] = {}

    def on_cut(self, generation: Generation) -> None:
        self.kept[generation] = [[sort(layer) for layer in generation.kept_prompt]]

    def on_step(self, lane: LaneView) -> None:
        for cache in lane.caches:
            assert int((cache.positions[lane.row] >= 0).sum(-1).max()) == cache.used[lane.row]
        self.kept[lane.generation].append([sort(layer) for layer in lane.kept])
        self.look(lane)

    @property
    def steps(self) -> int:
        """Of all lanes together."""
        return sum(len(history) - 1 for history in self.kept.values())


def sort(positions: Tensor) -> list[list[int]]:
    """Per KV head, ascending."""
    return [sorted(head) for head in positions.tolist()]


def logits_of(model: Any, run: Callable[[], object]) -> list[Tensor]:
    """The last token's logits of every forward pass that `run` makes, `(lanes, vocabulary)` each."""
    found: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, given, result: found.append(result.logits[:, -1].clone()))
    try:
        run()
    finally:
        hook.remove()
    return found
