"""Tiny random models for the tests: built from a config, offline, in milliseconds, always the same weights.

The weights are scaled so that attention is far from uniform (its logits have a standard deviation of two to
three), else every eviction policy would choose among ties and an oracle test would prove nothing.
"""

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from src.models.load import LoadedModel

# What differs from the common shape below, per architecture.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "gemma": {},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 4096},
    # Capped attention logits and sliding layers: what the engine must honour or refuse.
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 32},
}

# What the engine must reproduce exactly (full cache equals `generate`).
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries: two query heads share one KV head
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,  # tied random embeddings would repeat the last token for ever
    "bos_token_id": None,  # no stop token: `generate` runs to its length
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny(arch: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of this architecture in eval mode; `overrides` are keys of its config."""
    config = AutoConfig.for_model(arch, **{**SHAPE, **ARCHITECTURES[arch], **overrides})
    with torch.random.fork_rng(devices=[]):  # leaves the test's own random numbers alone
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scale_weights(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def scale_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw every weight anew: matrices keep the size of their input, those of queries and keys enlarge it."""
    for name, weight in model.named_parameters():
        part = name.split(".")[-2]
        if part in ("q_norm", "k_norm"):  # these undo the scale of q_proj and k_proj, so the scale goes here
            weight.add_(0.6)
        elif name.endswith(".bias"):
            weight.normal_(0.0, 0.1, generator=generator)
        elif part == "embed_tokens":
            weight.normal_(0.0, 1.0, generator=generator)
        elif weight.ndim == 2:
            gain = 1.6 if part in ("q_proj", "k_proj", "qkv_proj") else 1.0
            weight.normal_(0.0, gain * weight.shape[1] ** -0.5, generator=generator)


def tokens(length: int, vocab_size: int = 128, seed: int = 0) -> torch.Tensor:
    """Random prompt ids, (1, length)."""
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character, its id the character's code; anything else is <unk>. Has a chat form."""
    special = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocabulary = special | {chr(code): code for code in range(3, 128)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_loaded(arch: str = "llama", stop_ids: frozenset[int] = frozenset(), **overrides: Any) -> LoadedModel:
    """A tiny model as `load_model` would hand it over: no stop token unless given, so lengths are known."""
    model = tiny(arch, **overrides)
    return LoadedModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        name=f"tiny-{arch}",
        stop_ids=stop_ids,
        max_prompt_tokens=3500,
        context_length=4096,
        random_weights=True,
        dtype=model.dtype,
        device=model.device,
        chat=True,
        source="tests/support/tiny.py",
    )
