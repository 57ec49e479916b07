"""Turning already rotated queries by further positions: what StreamingLLM's in-cache positions need."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.errors import InputError
from src.prompt_attention import precise


class Rotary:
    """Rotary position embedding as a group action: turning by `a` and then by `b` is turning by `a + b`.

    Args:
        model: its rotary embedding's frequencies are read; models in this project's scope pair dimension `c`
            with `c + rotary_dim / 2` and may rotate only the first dimensions of a head (Phi-3).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found: list[object] = [getattr(module, "inv_freq", None) for module in model.modules()]
        frequencies = [f for f in found if isinstance(f, Tensor)]
        self.frequencies: Tensor | None = frequencies[0] if len(frequencies) == 1 else None
        kinds = {str(getattr(m, "rope_type", "default")) for m in model.modules() if hasattr(m, "inv_freq")}
        self.refused = "" if self.frequencies is not None else "no single rotary embedding for all layers"
        if kinds & {"dynamic", "longrope"}:
            self.refused = f"rotary frequencies that change with the length ({', '.join(sorted(kinds))})"

    def turn(self, vectors: Tensor, shift: Tensor) -> Tensor:
        """`vectors` `(lanes, ..., head_dim)` turned by `shift` positions `(lanes,)`.

        Raises:
            InputError: the model has no single, fixed set of rotary frequencies.
        """
        if self.frequencies is None or self.refused:
            raise InputError(
                f"in-cache positions need one fixed rotary embedding; this model has {self.refused}. "
                "Valid: policy.positions=original"
            )
        shape = (shift.shape[0],) + (1,) * (vectors.dim() - 2) + (-1,)
        frequencies = self.frequencies.to(vectors.device, torch.float64)
        angle = (shift[:, None].double() * frequencies).view(shape)
        cos, sin = precise(angle.cos().to(vectors.dtype)), precise(angle.sin().to(vectors.dtype))
        half = angle.shape[-1]
        exact = precise(vectors)
        first, second, rest = exact.split([half, half, exact.shape[-1] - 2 * half], dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        return turned.to(vectors.dtype)
