"""Which models can be served, and texts of what length: read off the config, before anything runs.

The engine keeps one growing cache per layer and attends causally to all of it. A model that needs anything else of a
layer is refused; one that needs it only for longer texts (windows, chunks, tables of positions) is served up to there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from src.errors import InputError

SERVED = frozenset({"full_attention", "attention", "sliding_attention", "chunked_attention"})
LISTS = ("layer_types", "layers_block_type", "block_types")  # where configs name each layer's kind
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size")
# Keys that change attention whenever they are set, and what they mean.
FEATURES = {
    "attn_logit_softcapping": "caps its attention logits",
    "index_topk": "chooses the tokens of each layer by an indexer (sparse attention)",
    "keep_window_size": "makes an attention mask of its own",
    "num_kv_shared_layers": "has layers that share the keys and values of others",
    "cross_attention_layers": "has cross-attention layers",
}
PER_LAYER = ("head_dim", "num_attention_heads", "num_key_value_heads")  # what must be the same in all layers


@dataclass(frozen=True)
class Limit:
    """Texts (prompt and new tokens) longer than `tokens` are not served; `reason` says why."""

    tokens: int
    reason: str


def check_kinds(config: PreTrainedConfig) -> None:
    """Can this architecture be served at all?

    Raises:
        InputError: it names the model type and the reason.
    """
    config = config.get_text_config()
    found = sorted({str(kind) for name in LISTS for kind in listed(config, name)} - SERVED)
    if found:
        _refuse(config, f"has layers of kind {', '.join(found)}", f"layers of kind {', '.join(sorted(SERVED))}")
    for name, meaning in FEATURES.items():
        if any(value not in (None, False, 0, 0.0, []) for value in per_layer(config, name)):
            _refuse(config, f"{meaning} ({name})", "a model without")
    if getattr(config, "use_bidirectional_attention", None) in (True, "all") or not getattr(config, "is_causal", True):
        _refuse(config, "attends in both directions", "a causal language model")
    for name in PER_LAYER:
        if len(sizes := {value for value in per_layer(config, name) if value is not None}) > 1:
            shown = ", ".join(map(str, sorted(sizes)))
            _refuse(config, f"has layers of different {name} ({shown})", "a model whose layers are of one shape")


def text_limits(config: PreTrainedConfig) -> list[Limit]:
    """What bounds the length of a text, by the config alone; see `table_limits` for the rest."""
    config = config.get_text_config()
    kind, kinds = config.model_type, set(listed(config, "layer_types"))
    limits = []
    if getattr(config, "use_sliding_window", True) is not False and (not kinds or "sliding_attention" in kinds):
        for name in WINDOWS:
            limits += [
                Limit(size, f"model type {kind} attends within a sliding window ({name}={size})")
                for size in {*per_layer(config, name)}
                if type(size) is int and size > 0
            ]
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and (not kinds or "chunked_attention" in kinds):
        limits.append(Limit(chunk, f"model type {kind} attends within chunks (attention_chunk_size={chunk})"))
    scale = getattr(config, "floor_scale", None)
    if scale and getattr(config, "attn_temperature_tuning", False) and not all(listed(config, "no_rope_layers")):
        # Its layers count positions from the cache of transformers, which is not used here.
        reason = f"model type {kind} scales queries by their position from token {scale} on (attn_temperature_tuning)"
        limits.append(Limit(int(scale) - 1, reason))
    for rope in rope_parameters(config):
        if "dynamic" in str(rope.get("rope_type")):
            # Frequencies grow with the longest text so far; only below this length does the model put them back.
            size = min(rope.get("original_max_position_embeddings") or 1 << 62, config.max_position_embeddings)
            limits.append(Limit(size - 1, f"model type {kind} changes its rotary frequencies from {size} tokens on"))
    return list(dict.fromkeys(limits))  # a config may say one thing twice


def table_limits(model: PreTrainedModel) -> list[Limit]:
    """A bound for models that look positions up in a table: beyond its last row there is nothing to look up."""
    config = model.config.get_text_config()
    said = getattr(config, "max_position_embeddings", None)
    rows = set()
    for name, module in text_modules(model):
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe")):
            # Some tables have a few rows more than there are positions, which the config counts.
            rows.add(min(module.num_embeddings, said or module.num_embeddings))
        held = {**dict(module.named_buffers(recurse=False)), **vars(module)}
        rows |= {len(t) for key, t in held.items() if is_table(t) and "pos" in key}
    return [Limit(n, f"model type {config.model_type} has a table of {n} positions") for n in sorted(rows)]


def is_table(held: object) -> bool:
    """Whether a module's attribute may hold a vector for each position."""
    return isinstance(held, Tensor) and held.dim() == 2 and held.is_floating_point()


def text_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """All parts of a model but the ones that read images or sound."""
    configs = (model.config, model.config.get_text_config())
    others = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and all(module.config is not config for config in configs)
    )
    return ((name, module) for name, module in model.named_modules() if not f"{name}.".startswith(others))


def rope_switch(config: PreTrainedConfig) -> int | None:
    """The length above which a model takes another set of rotary frequencies for all its tokens (longrope)."""
    config = config.get_text_config()
    for rope in rope_parameters(config):
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings")
            return int(original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
    return None


@dataclass(frozen=True)
class TextLengths:
    """What a loaded model says about the length of texts: `first` tokens are read at once, up to `last` in all."""

    limits: tuple[Limit, ...]
    switch: int | None  # see `rope_switch`

    @classmethod
    def of(cls, model: PreTrainedModel) -> TextLengths:
        return cls((*text_limits(model.config), *table_limits(model)), rope_switch(model.config))

    def refusal(self, first: int, last: int) -> str | None:
        """Why this text cannot be served; None: it can."""
        for limit in self.limits:
            if last > limit.tokens:
                return f"{limit.reason}, the text may reach {last} tokens; valid: {limit.tokens} tokens at most"
        if self.switch is not None and first <= self.switch < last:
            return (
                f"the model changes its rotary frequencies at {self.switch} tokens (longrope), the text grows from "
                f"{first} to as many as {last}; valid: texts on one side of it, by other prompts or max_new_tokens"
            )
        return None

    def long(self, last: int) -> bool:
        """Which set of rotary frequencies a text takes; texts of both kinds cannot share a forward pass."""
        return self.switch is not None and last > self.switch


def check_lengths(limits: list[Limit] | tuple[Limit, ...], prompt: int, new: int = 0) -> None:
    """Do the settings allow only texts that can be served?

    Args:
        prompt: `model.max_prompt_tokens`.
        new: the most tokens that are generated; 0: not known yet.

    Raises:
        InputError: it names the setting and what would be valid.
    """
    for limit in limits:
        if prompt + new > limit.tokens:
            most = limit.tokens - new
            and_new = f" and max_new_tokens={new}" if new else ""
            wayout = f"model.max_prompt_tokens={most} or less" if most >= 2 else f"max_new_tokens below {limit.tokens}"
            raise InputError(f"model.max_prompt_tokens={prompt}{and_new}: {limit.reason}; valid: {wayout}")


def per_layer(config: PreTrainedConfig, name: str) -> list[Any]:
    """A key's value in every layer; one value where the config has one for all."""
    if getattr(config, "is_heterogeneous", False):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return [getattr(config, name, None)]


def first_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """Sizes of a layer (`check_kinds`: the same in all), where reading them off the whole config may be refused."""
    config = config.get_text_config()
    return config.per_layer_config[0] if getattr(config, "is_heterogeneous", False) else config


def listed(config: PreTrainedConfig, name: str) -> list[Any]:
    """A key that holds one entry per layer; empty where there is none."""
    found = getattr(config, name, None)
    return list(found) if isinstance(found, list | tuple) else []


def rope_parameters(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Of every kind of layer: some models have one set, some one for each kind."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (found, *found.values()):
        if isinstance(rope, dict) and "rope_type" in rope:
            yield rope


def _refuse(config: PreTrainedConfig, why: str, valid: str) -> None:
    raise InputError(f"model type {config.model_type} {why}, which the engine does not serve; valid: {valid}")
