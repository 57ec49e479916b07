"""Tiny configs of more than 110 architectures, by what is expected of them. `name (variant)` is of model type `name`.

A config gives only what differs from `build.SHAPE` and from the architecture's own defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A tiny model and what is expected.

    Args:
        name: the model type, with a variant in brackets.
        options: keys of its config.
        refused: words of the refusal at load; empty: it is served, and `full` gives what `generate` gives.
        in_cache: words of the refusal of in-cache positions; empty: queries are turned rightly.
    """

    name: str
    options: Options = field(default_factory=dict)
    refused: str = ""
    in_cache: str = ""

    @property
    def model_type(self) -> str:
        return self.name.split(" ")[0]


MOE: Options = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
}
MLA: Options = {
    **MOE,
    **{"q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{"head_dim": 8, "num_key_value_heads": 4},
}
MAMBA: Options = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
LINEAR: Options = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
FAR = 4096  # a window longer than every text here
WIDE: Options = {"sliding_window": FAR}
NARROW: Options = {"sliding_window": 16}
NO_WINDOW: Options = {"sliding_window": None}
HALF: Options = {"partial_rotary_factor": 0.5}
GEMMA: Options = {"query_pre_attn_scalar": 16}
SLIDE_AND_FULL: Options = {"layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER: Options = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128}
GEMMA3N: Options = {
    **{**PER_LAYER, **WIDE, "layer_types": ["full_attention"] * 2},
    **{"intermediate_size": [96, 96], "activation_sparsity_pattern": [0.0, 0.0]},
}
GEMMA4: Options = {**PER_LAYER, **WIDE, **SLIDE_AND_FULL, "num_kv_shared_layers": 0}
EVERY_SECOND: Options = {"no_rope_layers": [1, 0]}  # 0: a layer without rotation


def rope(kind: str, original: int = 64, **more: Any) -> Options:
    given = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": original, **more}
    return {"rope_parameters": given}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = rope("yarn", 1024, factor=4.0)
SCALED = {"llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
LONGROPE = rope("longrope", short_factor=[1.0] * 8, long_factor=[1 + i / 4 for i in range(8)])
LLAMA4: Options = {**MOE, **EVERY_SECOND, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}

# Served: full is exact, in-cache positions are right.
RIGHT: dict[str, Options] = {
    "llama": {},
    "llama (llama3 frequencies)": LLAMA3,
    "llama (yarn)": YARN,
    "llama (linear)": rope("linear", factor=4.0),
    "mistral": NO_WINDOW,
    "mistral (window longer than the text)": WIDE,
    "ministral": WIDE,
    "aria_text": MOE,
    "mixtral": {**MOE, **NO_WINDOW},
    "qwen2": {"use_sliding_window": False},
    "qwen2_moe": {**MOE, "use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "qwen3_moe": {**MOE, "use_sliding_window": False},
    "gemma": {},
    "gemma2 (no soft cap)": {**GEMMA, **WIDE, "attn_logit_softcapping": None},
    "gemma3_text (window longer than the text)": {**GEMMA, **WIDE, **SLIDE_AND_FULL},
    "gemma3n_text (no shared layers)": {**GEMMA3N, "num_kv_shared_layers": 0},
    "gemma4_text (one head size)": {**GEMMA4, "global_head_dim": 16},
    "vaultgemma": {**GEMMA, **WIDE, "attn_logit_softcapping": None},
    "phi": HALF,
    "phi3": {**NO_WINDOW, "original_max_position_embeddings": FAR},
    "phi3 (partly rotated)": {
        **{**NO_WINDOW, "original_max_position_embeddings": FAR, "partial_rotary_factor": 0.75},
        "head_dim": 32,
    },
    "phimoe": {**MOE, **NO_WINDOW},
    "olmo": {},
    "olmo2": {},
    "olmo3": WIDE,
    "olmoe": MOE,
    "flex_olmo": MOE,
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 1.5},
    "granitemoe": MOE,
    "granitemoeshared": MOE,
    "cohere": {},
    "cohere2": {**WIDE, **SLIDE_AND_FULL},
    "starcoder2": NO_WINDOW,
    "gpt_neox": {"rotary_pct": 0.25},
    "persimmon": {},
    "glm": HALF,
    "glm4": HALF,
    "glm4_moe": {**MOE, **HALF},
    "internlm3": {},
    "helium": {},
    "exaone4": {**WIDE, **SLIDE_AND_FULL},
    "smollm3": {**EVERY_SECOND, "use_sliding_window": False},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "glm4_moe_lite": MLA,
    "minicpm3": MLA,
    "youtu": MLA,
    "axk1": MLA,
    "longcat_flash": {**MLA, "num_layers": 1, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48},
    "llama4_text (chunk longer than the text)": {**LLAMA4, "attention_chunk_size": FAR},
    "minimax_m2": MOE,
    "ernie4_5": {},
    "ernie4_5_moe": MOE,
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {**MOE, "moe_topk": [2, 2]},
    "seed_oss": {},
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "jais2": {},
    "cwm": {**WIDE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "hyperclovax": {},
    "dots1": {**MOE, **NO_WINDOW, "layer_types": ["full_attention"] * 2, "routed_scaling_factor": 1.0},
    "afmoe": {**MOE, **WIDE},
    "solar_open": MOE,
    "nanochat": {},
    "laguna": MOE,
    "hy_v3": MOE,
    "mellum": MOE,
    "iquestcoder": {},
    "exaone_moe": {**MOE, **WIDE, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2_moe": {**MOE, **SLIDE_AND_FULL},
    "minimax_m3_vl_text": MOE,
    "jetmoe": MOE,
    "granitemoehybrid (attention only)": {**MAMBA, **MOE, "layer_types": ["attention"] * 2},
}

# Served, but in-cache positions are refused: (words of the refusal, config).
IN_PLACE: dict[str, tuple[str, Options]] = {
    "gpt2": ("without a rotary embedding", {}),
    "gpt2 (scaled by layer)": ("without a rotary embedding", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode": ("without a rotary embedding", {}),
    "opt": ("without a rotary embedding", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "biogpt": ("without a rotary embedding", {}),
    "ministral3": ("the size of the queries", {**rope("yarn", 1024, factor=4.0, **SCALED), **NO_WINDOW}),
    "beam": ("the size of the queries", {}),
    "llama (dynamic)": ("length of the text", rope("dynamic", factor=4.0)),
    "phi3 (longrope)": ("length of the text", {**NO_WINDOW, **LONGROPE, "original_max_position_embeddings": 64}),
}

# Refused when the model is loaded: (words of the refusal, config).
REFUSED: dict[str, tuple[str, Options]] = {
    "mistral (window)": ("sliding window", NARROW),
    "qwen2 (window)": ("sliding window", {**NARROW, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma2": ("caps its attention logits", {**GEMMA, **WIDE}),
    "gemma3_text": ("sliding window", {**GEMMA, **NARROW, **SLIDE_AND_FULL}),
    "gpt_oss": ("sinks", {**MOE, **WIDE}),
    "mimo_v2_flash": ("sinks", {**MOE, **WIDE}),
    "granitemoe_swa": ("sinks", {**MOE, **WIDE}),
    "flint": ("sinks", {}),
    "llama4_text (chunk)": ("chunks", {**LLAMA4, "attention_chunk_size": 16}),
    "doge": ("mask", {}),
    "diffllama": ("exactly once", {}),
    "deepseek_v32": ("index", {**MLA, "index_topk": 32, "index_n_heads": 2, "index_head_dim": 16}),
    "qwen3_next": ("linear_attention", {**MOE, **LINEAR}),
    "qwen3_5_text": ("linear_attention", LINEAR),
    "olmo_hybrid": ("linear_attention", LINEAR),
    "granitemoehybrid": ("linear_attention", {**MAMBA, **MOE, "layer_types": ["mamba", "attention"]}),
    "lfm2": ("conv", {"layer_types": ["full_attention", "conv"], "block_ff_dim": 96}),
    "bamba": ("linear_attention", {**MAMBA, "attn_layer_indices": [1]}),
    "jamba": ("mamba", {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "nemotron_h": (
        "linear_attention",
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "n_groups": 1},
    ),
    "falcon_h1": ("layers of kind hybrid", {**MAMBA, "mamba_d_ssm": 128}),
    "mamba2": ("linear_attention", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1}),
    "minimax": ("linear_attention", {**MOE, "layer_types": ["linear_attention", "full_attention"]}),
    "recurrent_gemma": ("recurrent", {"block_types": ["recurrent", "attention"], "lru_width": 64}),
    "hrm_text": ("exactly once", {}),
    "gemma3n_text": ("share the keys", {**GEMMA3N, "num_kv_shared_layers": 1}),
    "gemma4_text": ("different head_dim", {**GEMMA4, "global_head_dim": 32}),
    "bert": ("not causal", {}),
    "gptj": ("code of its own", {"rotary_dim": 8}),
    "codegen": ("code of its own", {"rotary_dim": 8}),
    "gpt_neo": ("code of its own", {"attention_types": [[["global", "local"], 1]], "window_size": FAR}),
    "bloom": ("code of its own", {}),
    "falcon": ("code of its own", {"alibi": False}),
    "mpt": ("code of its own", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "xglm": ("code of its own", {"ffn_dim": 96}),
    "openai-gpt": ("code of its own", {}),
    "stablelm": ("not handed", {"partial_rotary_factor": 0.25}),
    "nemotron": ("not handed", HALF),
}

ARCHITECTURES: dict[str, Architecture] = {
    **{name: Architecture(name, options) for name, options in RIGHT.items()},
    **{name: Architecture(name, options, in_cache=words) for name, (words, options) in IN_PLACE.items()},
    **{name: Architecture(name, options, refused=words) for name, (words, options) in REFUSED.items()},
}
