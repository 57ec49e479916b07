"""What policies remember (`State`), for several lanes at once, moved along with the cache's slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.base import State


def stack_states(states: Sequence[State], slots: int) -> State:
    """One state for several lanes: `slots` tensors padded to `slots + 1` columns and stacked in front."""

    def padded(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, slots + 1 - tensor.shape[-1]))

    return State(
        slots={name: torch.stack([padded(s.slots[name]) for s in states]) for name in states[0].slots},
        fixed={name: torch.stack([s.fixed[name] for s in states]) for name in states[0].fixed},
    )


def settle(state: State, slot: Tensor) -> None:
    """Move the incoming token's column to its slot `(lanes, kv_heads)` in every slot tensor, and clear it."""
    for tensor in state.slots.values():
        index = slot.view(*slot.shape, *(1,) * (tensor.dim() - 2)).expand(*tensor.shape[:-1], 1)
        tensor.scatter_(-1, index, tensor[..., -1:].clone())  # torch refuses a source that overlaps its target
        tensor[..., -1] = 0
