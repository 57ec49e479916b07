"""What policies remember (`State`), for several lanes at once, moved along with the cache's slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


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


@dataclass(frozen=True)
class ModelShape:
    """What a policy may know about the model (`Policy.bind`).

    Attributes:
        weights: a digest that tells checkpoints apart.
        encode: text -> its token ids, without special tokens; None: no tokenizer is known.
        turn: the token ids that stand between a user's message and the answer in the model's chat form.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    weights: str = ""
    encode: Callable[[str], list[int]] | None = field(default=None, compare=False, repr=False)
    turn: Callable[[], list[int]] | None = field(default=None, compare=False, repr=False)


@dataclass
class State:
    """What a policy remembers about the cached tokens of one layer.

    Attributes:
        slots: tensors that hold something for every cached token, `(lanes, kv_heads, ..., slots + 1)`. The
            last column belongs to the incoming token; when that token is given a slot, the engine moves the
            column there. A policy never does this book-keeping itself.
        fixed: tensors that do not follow the slots, `(lanes, ...)`.
    """

    slots: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Bytes of book-keeping, all lanes together."""
        return sum(t.untyped_storage().nbytes() for t in (*self.slots.values(), *self.fixed.values()))

    def grow(self, added: int) -> None:
        """Columns for so many more slots."""
        self.slots = {name: F.pad(tensor, (0, added)) for name, tensor in self.slots.items()}

    def select(self, lanes: Tensor) -> None:
        """Keep only these lanes."""
        self.slots = {name: tensor[lanes] for name, tensor in self.slots.items()}
        self.fixed = {name: tensor[lanes] for name, tensor in self.fixed.items()}

    def keep(self, slots: Tensor) -> None:
        """Keep only these slots `(lanes, kv_heads, k)`, moved to the front; the incoming token's column stays."""
        for name, tensor in self.slots.items():
            index = slots.view(*slots.shape[:2], *(1,) * (tensor.dim() - 3), -1)
            index = index.expand(*tensor.shape[:-1], -1)
            kept = torch.zeros_like(tensor)
            kept[..., : slots.shape[-1]] = tensor.gather(-1, index)
            kept[..., -1] = tensor[..., -1]
            self.slots[name] = kept
