"""The single point of contact with transformers: one attention function, one mask function, one way to call a model.

Both functions are registered once, under `NAME`. A model that was given `set_attn_implementation(NAME)` and is
called with `lanes=...` hands every layer's rotated queries, keys and values of the *new* tokens to `lanes.attend`.
Whatever else a model asks of its attention is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from src.errors import InputError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of queries, keys and values
Rotate = Callable[[Tensor, Tensor], Tensor]  # vectors, and by how many positions each
RotateLayer = Callable[[Tensor, Tensor, int], Tensor]  # the last one: which layer's vectors they are

NAME = "lanes"
# What models pass to their attention that does not change its result: positions are applied before it, the rest
# says what the model itself should return.
HARMLESS = (
    *("position_ids", "cache_position", "position_embeddings", "use_cache", "logits_to_keep", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
)
PLAIN = {"dropout": 0.0, "is_causal": True}  # keywords that must have this value


class Lanes(Protocol):
    """What decides, layer by layer, what is attended and what stays: `Prefill`, `LaneBatch` (src.engine), a watcher."""

    @property
    def longest(self) -> int:
        """Of the texts under way, in tokens."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """One layer's new tokens: `(batch, heads, new, head_dim)` in, `(batch, new, heads, head_dim)` out.

        Args:
            attention: causal attention of the new tokens to each other, by the model's own function.
        """


def lanes_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    lanes: Lanes | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; `lanes` decides what is attended and what stays.

    Args:
        query: `(batch, heads, new, head_dim)`; key and value `(batch, kv_heads, new, head_dim)`.
        lanes: None where the model was not called by `forward`.

    Returns:
        `(batch, new, heads, head_dim)` and None (no weights).

    Raises:
        InputError: the layer needs more than causal attention: a mask of the model's own, logit soft-capping,
            sinks, a sliding window shorter than the text, or a keyword argument that is not known here.
    """
    name = described(module)
    if lanes is None:
        raise InputError(
            f"{name} was not handed lanes=..., which attention implementation {NAME!r} needs; valid: src.engine.Engine "
            "in place of a call of the model, and a model that hands keyword arguments down to its attention"
        )
    refuse_more(name, lanes.longest, attention_mask, sliding_window, softcap, kwargs)

    def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention over everything, by the very function transformers would have used."""
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out: Tensor = sdpa(module, query, key, value, None, scaling=scaling, is_causal=True, dropout=0.0)[0]
        return out

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise InputError(f"{name} does not say which layer it is; valid: a model with plain causal attention")
    return lanes.attend(layer, query, key, value, scale, whole), None


def refuse_more(
    name: str,
    longest: int,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    kwargs: Mapping[str, Any],
) -> None:
    """A layer that asks for more than causal attention over the whole text.

    Args:
        name: the layer, for messages.
        longest: of the texts under way, in tokens.
        kwargs: what else it passes to its attention.

    Raises:
        InputError: it names what the layer asks for.
    """
    if attention_mask is not None:
        raise InputError(f"{name} passes an attention_mask of its own; valid: a model with plain causal attention")
    if softcap is not None:
        raise InputError(f"{name} caps its attention logits (softcap={softcap}); valid: a model without")
    if kwargs.get("s_aux") is not None:
        raise InputError(f"{name} has learned attention sinks (s_aux); valid: a model without")
    for keyword, given in kwargs.items():
        if given is None or keyword in HARMLESS or (keyword in PLAIN and given == PLAIN[keyword]):
            continue
        raise InputError(
            f"{name} passes {keyword} to its attention, which is not supported; "
            "valid: a model with plain causal attention"
        )
    if sliding_window is not None and longest > sliding_window:
        raise InputError(
            f"{name} attends within sliding_window={sliding_window} tokens, the text has "
            f"{longest}; valid: a shorter model.max_prompt_tokens, or a model without a window"
        )


def described(module: torch.nn.Module) -> str:
    """A layer, for messages: the model's type and the layer's class."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return f"model type {kind}: {type(module).__name__}" if kind else f"model: {type(module).__name__}"


def no_mask(
    *args: Any, mask_function: Callable[..., Any] = causal_mask_function, local_size: int | None = None, **kwargs: Any
) -> None:
    """`lanes_attention` knows what is causal; no mask tensor is made.

    Raises:
        InputError: the model wants another mask: a window or chunk shorter than the text, or none that is causal.
    """
    length = kwargs.get("kv_length", 0)
    if mask_function is causal_mask_function or (local_size is not None and length <= local_size):
        return
    kinds = set(getattr(kwargs.get("config"), "layer_types", None) or ())
    if local_size is not None and kinds and not kinds & {"sliding_attention", "chunked_attention"}:
        return  # some models make the mask of a window that none of their layers has (Qwen2-MoE)
    kind = getattr(kwargs.get("config"), "model_type", "unknown")
    what = (
        "with a mask that is not causal" if local_size is None else f"within {local_size} tokens, the text has {length}"
    )
    raise InputError(f"model type {kind} attends {what}; valid: a model with plain causal attention")


class InOrder:
    """Stands before lanes during one forward pass: layers 0, 1, 2, ... of one shape must come once each.

    Lanes keep one cache per layer, so a layer that is left out (recurrent, convolutional), comes twice or in
    another order would read another layer's cache.
    """

    def __init__(self, lanes: Lanes, layers: int, kind: str) -> None:
        self.lanes, self.layers, self.kind = lanes, layers, kind
        self.next = 0
        self.shape: tuple[int, ...] | None = None

    @property
    def longest(self) -> int:
        """Of the texts under way, in tokens."""
        return self.lanes.longest

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """As `Lanes.attend`.

        Raises:
            InputError: it is not this layer's turn, or it is not of the other layers' shape.
        """
        if layer != self.next:
            raise InputError(self._refusal(f"attention layer {layer} came where layer {self.next} was due"))
        shape = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        if self.shape not in (None, shape):
            raise InputError(
                f"model type {self.kind}: layer {layer} has (heads, KV heads, key size, value size) {shape}, the ones "
                f"before {self.shape}; valid: a model whose layers are of one shape"
            )
        if query.shape[2] != key.shape[2]:
            raise InputError(
                f"model type {self.kind}: layer {layer} has {query.shape[2]} queries for {key.shape[2]} new keys; "
                "valid: a model each of whose layers reads every token"
            )
        self.next, self.shape = layer + 1, shape
        return self.lanes.attend(layer, query, key, value, scaling, attention)

    def finish(self) -> None:
        """The pass is over.

        Raises:
            InputError: layers are missing.
        """
        if self.next == 0:
            raise InputError(
                f"model type {self.kind} computes attention in code of its own, so no cache policy can be plugged in; "
                "valid: Llama, Mistral, Qwen, Gemma, Phi3 and others that use transformers' attention interface"
            )
        if self.next < self.layers:
            raise InputError(self._refusal(f"only {self.next} layers came to the attention function"))

    def _refusal(self, what: str) -> str:
        return (
            f"model type {self.kind}: {what}, of {self.layers} layers; valid: a model each of whose layers attends "
            "exactly once, in order (no recurrent or convolutional layers, none that are shared or repeated)"
        )


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, lanes: Lanes, **kwargs: Any) -> Tensor:
    """One forward pass of a model set to `NAME`; `lanes` sees every layer exactly once, in order.

    Args:
        ids: `(batch, new)`; positions alike.
        kwargs: for the model, e.g. `logits_to_keep=1`.

    Returns:
        Logits `(batch, new or fewer, vocabulary)`.

    Raises:
        InputError: the model is not of this form, or asks its attention for more than is supported.
    """
    config = model.config.get_text_config()
    order = InOrder(lanes, config.num_hidden_layers, config.model_type)
    logits: Tensor = model(ids, position_ids=positions, use_cache=False, lanes=order, **kwargs).logits
    order.finish()
    return logits


AttentionInterface.register(NAME, lanes_attention)
AttentionMaskInterface.register(NAME, no_mask)
