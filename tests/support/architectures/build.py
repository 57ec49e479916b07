"""Tiny random models of any architecture: built from a config, offline, always with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.support.architectures.table import Architecture

SHAPE: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096},
    **{"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}
NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
PEAKED = ("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn", "q_b_proj", "kv_b_proj", "query", "key")


def config(of: Architecture) -> PretrainedConfig:
    """`SHAPE` under the names that the architecture reads, and its own options."""
    defaults = AutoConfig.for_model(of.model_type)
    known, renamed = defaults.to_dict(), defaults.attribute_map
    shape = {renamed.get(key, key): value for key, value in SHAPE.items()}
    options = {renamed.get(key, key): value for key, value in of.options.items()}
    return AutoConfig.for_model(of.model_type, **{k: v for k, v in shape.items() if k in known} | options)


def build(of: Architecture, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """In eval mode, without gradients, in no time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(of), dtype=torch.float32)
    spread(model, torch.Generator().manual_seed(0))
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def spread(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw matrices anew, those of queries and keys larger, so that attention is far from uniform."""
    for name, weight in model.named_parameters():
        part = ["", *name.split(".")][-2]
        if part in NORMS:  # these undo the scale of the projections, so it goes here
            weight.add_(0.6)
        elif name.endswith(".bias"):
            weight.normal_(0, 0.1, generator=generator)
        elif "embed" in part or part in ("wte", "wpe"):
            weight.normal_(0, 1, generator=generator)
        elif weight.ndim == 2:
            weight.normal_(0, (1.6 if part in PEAKED else 1) * weight.shape[1] ** -0.5, generator=generator)
        elif weight.ndim == 3 and "expert" in name:
            weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
