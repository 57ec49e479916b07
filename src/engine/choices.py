"""What lanes attended to of what they held, where a policy has a reader: counted here, once for every reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from src.kv.cache import LayerCache
from src.kv.state import State, settle

BINS = 64  # of the histogram of chosen prompt positions


def no_choices(cache: LayerCache, length: int) -> State:
    """The tally of one layer of one lane whose prompt of `length` tokens was just cut.

    `picks`: how often each slot was attended to, by all steps and query heads; `last`: by what share of the query
    heads at the last step. `chosen`: tokens attended to at each step, mean over query heads; `held`: those that were
    there, the incoming one counted, mean over KV heads.
    """
    shape, device = cache.positions.shape[1:], cache.positions.device
    return State(
        slots={
            "picks": torch.zeros(shape, dtype=torch.int32, device=device),
            "last": torch.zeros(shape, device=device),
        },
        fixed={
            "chosen": torch.zeros(0, device=device),
            "held": torch.zeros(0, device=device),
            "length": torch.tensor(length, device=device),
        },
    )


class Choices:
    """The tallies of some lanes, a list over layers (`no_choices`, stacked). They move with the slots as policies'
    states do: a token that leaves the cache takes its counts along.
    """

    def __init__(self, layers: Sequence[State]) -> None:
        self.layers = list(layers)

    def note(self, layer: int, chosen: Tensor, held: Tensor) -> None:
        """One step's, both `(lanes, kv_heads, group, slots + 1)`, bool."""
        state = self.layers[layer]
        state.slots["picks"] += chosen.sum(dim=2, dtype=torch.int32)
        state.slots["last"] = chosen.float().mean(dim=2)
        for name, these in (("chosen", chosen), ("held", held)):
            counts = these.sum(-1, dtype=torch.float32).mean(dim=(1, 2))
            state.fixed[name] = torch.cat([state.fixed[name], counts[:, None]], dim=1)

    def settle(self, layer: int, slot: Tensor) -> None:
        """The incoming tokens' counts go to their slots, `(lanes, kv_heads)`."""
        settle(self.layers[layer], slot)

    def select(self, lanes: Tensor) -> None:
        """Keep only these lanes."""
        for state in self.layers:
            state.select(lanes)

    def attended(self, lane: int) -> list[Tensor]:
        """Per layer, the share of the query heads that attended to each slot at the last step, `(kv_heads, slots)`."""
        return [state.slots["last"][lane, :, :-1] for state in self.layers]

    def picks(self, lane: int) -> list[Tensor]:
        """Per layer, how often each slot was attended to, `(kv_heads, slots)`, int32."""
        return [state.slots["picks"][lane, :, :-1] for state in self.layers]

    def measures(self, lane: int, positions: Sequence[Tensor]) -> dict[str, Any]:
        """For the record of a finished lane: tokens chosen (mean over query heads), their share of those that were
        held, and where in the prompt those stood that are held still.

        Args:
            positions: per layer, of the lane's slots, `(kv_heads, slots)`, -1 where empty.
        """
        chosen, held = (
            torch.stack([state.fixed[name][lane] for state in self.layers]).double().cpu()  # (layers, steps)
            for name in ("chosen", "held")
        )
        if not chosen.shape[1]:
            return {}
        length = int(self.layers[0].fixed["length"][lane])
        bins = torch.zeros(BINS, dtype=torch.float64)
        for where, picks in zip(positions, self.picks(lane), strict=True):
            prompt = (where >= 0) & (where < length)
            bins.index_add_(0, where[prompt].long().cpu() * BINS // length, picks[prompt].double().cpu())
        return {
            "chosen_share": round(float((chosen / held).mean()), 6),
            "chosen_by_layer": [round(x, 2) for x in chosen.mean(dim=1).tolist()],
            "chosen_by_step": [round(x, 2) for x in chosen.mean(dim=0).tolist()],
            "chosen_positions": [round(x, 6) for x in (bins / bins.sum().clamp_min(1)).tolist()],
        }
