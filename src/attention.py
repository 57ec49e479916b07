"""The single point of contact with transformers: one attention function, one mask function.

Both are registered once, under `NAME`. A model that was given `set_attn_implementation(NAME)` and is called
with `lanes=...` hands every layer's rotated queries, keys and values of the *new* tokens to `lanes.attend`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from src.errors import InputError

NAME = "lanes"


def lanes_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    lanes: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; `lanes` decides what is attended and what stays.

    Args:
        query: `(batch, heads, new, head_dim)`; key and value `(batch, kv_heads, new, head_dim)`.
        lanes: a `src.lanes.Prefill` or `src.lanes.LaneBatch`.

    Returns:
        `(batch, new, heads, head_dim)` and None (no weights).

    Raises:
        InputError: the layer needs logit soft-capping, or a sliding window shorter than the text.
    """
    name = type(module).__name__
    if lanes is None:
        raise InputError(f"attention implementation {NAME!r} needs lanes=...; valid: use src.engine.Engine")
    if softcap is not None:
        raise InputError(f"model: {name} caps its attention logits (softcap={softcap}); valid: a model without")
    if kwargs.get("s_aux") is not None:
        raise InputError(f"model: {name} has learned attention sinks; valid: a model without")
    if sliding_window is not None and lanes.longest > sliding_window:
        raise InputError(
            f"model: {name} attends within sliding_window={sliding_window} tokens, the text has "
            f"{lanes.longest}; valid: a shorter model.max_prompt_tokens, or a model without a window"
        )

    def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention over everything, by the very function transformers would have used."""
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, None, scaling=scaling, is_causal=True, dropout=0.0)[0]

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return lanes.attend(module.layer_idx, query, key, value, scale, whole), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """`lanes_attention` knows what is causal; no mask tensor is made."""


AttentionInterface.register(NAME, lanes_attention)
AttentionMaskInterface.register(NAME, no_mask)
