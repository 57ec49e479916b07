"""Load a model and its tokenizer: from the hub, a folder, the embedded weights, or with random weights.

Weights are read from safetensors only (or an unpacked GGUF file): no pickle is ever opened.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from src.engine.layer_kinds import TextLengths, check_kinds, check_lengths, text_limits
from src.errors import InputError
from src.files import cache_folder
from src.models.chat import ChatForm, after_message, chat_form
from src.models.device import choose_device, choose_dtype
from src.models.embedded import package_file, unpacked
from src.models.fingerprint import ModelFiles, digest_of
from src.models.self_check import check_once
from src.models.settings import ModelSettings, context_length, model_name, prompt_limit, read_yaml
from src.models.weights import find_weights, load_config, load_tokenizer, load_weights

log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model ready to run, with everything the rest of the harness must know about it."""

    model: PreTrainedModel  # eval mode, no gradients, on `device`
    tokenizer: Tokenizer
    name: str
    stop_ids: frozenset[int]  # any of these ends an answer
    max_prompt_tokens: int  # longer prompts lose their middle
    context_length: int
    random_weights: bool  # True: the answers mean nothing, only memory and speed do
    dtype: torch.dtype
    device: torch.device
    chat: bool
    form: ChatForm = field(default_factory=ChatForm)  # what its chat template puts around a prompt
    source: str = ""  # where the weights came from, for the record
    fingerprint: str = ""  # of the content of all files that were read, or of a random model's shape
    files: ModelFiles | None = None  # what was read; none of random weights

    @property
    def vocab_size(self) -> int:
        """Valid token ids are below it."""
        return int(self.model.config.get_text_config().vocab_size)

    def newline_ids(self) -> frozenset[int]:
        """The token that ends an answer of one line, as LongBench finds it: the last one of "\\n" encoded."""
        return frozenset(self.tokenizer.encode("\n", add_special_tokens=False)[-1:])

    def encode(self, text: str) -> list[int]:
        """A text's ids as the model can read them, without special tokens."""
        return self.fit_ids(self.tokenizer.encode(text, add_special_tokens=False))

    def turn_ids(self) -> list[int]:
        """What the chat form puts between a user's message and the answer; a line break where there is none."""
        if not (self.chat and self.tokenizer.chat_template):
            return self.encode("\n")
        return self.encode(after_message(self.tokenizer, self.form))

    def fit_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids modulo the vocabulary: the same ids for every real model.

        A random model borrows the embedded model's tokenizer, whose vocabulary may be the larger one.
        """
        return [i % self.vocab_size for i in ids]


def load_model(given: ModelSettings | Mapping[str, Any]) -> LoadedModel:
    """Load what a `conf/model` file describes; of a plain mapping, keys left out have the values of `_base.yaml`."""
    settings = given if isinstance(given, ModelSettings) else ModelSettings.of(given)
    transformers_logging.disable_progress_bar()
    name = model_name(settings)
    device = choose_device(str(settings.device))
    dtype = choose_dtype(str(settings.dtype), device)
    files: ModelFiles | None = None
    if settings.like:
        settings = with_limits_of(settings, settings.like)
        model, tokenizer, fingerprint = build_random(settings, dtype, device)
        source = f"random weights in the shape of {settings.like}"
    else:
        files, source = find_weights(settings)
        folder, fingerprint = files.folder, files.fingerprint
        tokenizer = load_tokenizer(folder, settings.trust_remote_code)
        config = load_config(folder, settings.trust_remote_code)
        check_config(config, settings, folder)
        model = load_weights(folder, dtype, device, settings.trust_remote_code)
        files.refuse(files.changed())
    model.eval().requires_grad_(False)
    if settings.chat_template:
        tokenizer.chat_template = settings.chat_template
    if settings.chat and not tokenizer.chat_template:
        raise InputError(
            f"model.chat=true: the tokenizer of {name} has no chat template; "
            "set model.chat=false (a base model) or model.chat_template"
        )
    form = ChatForm(dict(settings.template_kwargs), settings.thinking)
    if settings.chat:
        form = chat_form(tokenizer, settings, name)
    context = context_length(settings, model.config)
    limit = prompt_limit(settings.max_prompt_tokens, context)
    check_lengths(TextLengths.of(model).limits, limit)
    self_check(model, settings)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        # Random weights never mean to stop, and a run that times them should not stop by chance.
        stop_ids=frozenset() if settings.like else stop_ids(model, tokenizer, settings.stop_tokens),
        max_prompt_tokens=limit,
        context_length=context,
        random_weights=bool(settings.like),
        dtype=dtype,
        device=device,
        chat=settings.chat,
        form=form,
        source=source,
        fingerprint=fingerprint,
        files=files,
    )


# ---- settings ------------------------------------------------------------------------------------------


def stop_ids(model: PreTrainedModel, tokenizer: Tokenizer, stop_tokens: Sequence[str]) -> frozenset[int]:
    """Every way this model ends an answer. One alone is not enough: Llama 3 chats end with <|eot_id|>."""
    found: set[int] = set()
    for end in (
        model.generation_config.eos_token_id if model.generation_config else None,
        tokenizer.eos_token_id,
    ):
        found.update(end if isinstance(end, list) else [] if end is None else [end])
    vocabulary = tokenizer.get_vocab()
    for token in stop_tokens:
        if token not in vocabulary:
            raise InputError(f"model.stop_tokens: {token!r} is not a token of this model's tokenizer")
        found.add(vocabulary[token])
    return frozenset(found)


# ---- weights -------------------------------------------------------------------------------------------


def check_config(config: PreTrainedConfig, settings: ModelSettings, folder: Path) -> None:
    """Refuse what cannot be served before its weights are read."""
    try:
        check_kinds(config)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    limit = prompt_limit(settings.max_prompt_tokens, context_length(settings, config))
    check_lengths(text_limits(config), limit)


def self_check(model: PreTrainedModel, settings: ModelSettings) -> None:
    """The full cache against the plain model (`src.models.self_check`), or a look at the layers only."""
    # Random weights mean nothing, and with billions of them a CPU would need minutes.
    huge = settings.like and model.device.type == "cpu" and model.num_parameters() > 1e9
    try:
        check_once(model, cache_folder() / "self-check", compare=settings.self_check and not huge)
    except InputError as error:
        raise InputError(f"{model_name(settings)}: {error}") from None


def with_limits_of(settings: ModelSettings, like: str) -> ModelSettings:
    """The context and the longest prompt of the model whose shape is borrowed, where the settings say nothing."""
    original = read_yaml(like)
    return replace(
        settings,
        context_length=settings.context_length or original.get("context_length"),
        max_prompt_tokens=settings.max_prompt_tokens or original.get("max_prompt_tokens"),
    )


def build_random(
    settings: ModelSettings, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Tokenizer, str]:
    """Another model's real shape with random weights, a borrowed tokenizer, and the fingerprint of both."""
    shape = settings.random_shape()
    borrowed = unpacked(package_file(str(settings.package_file)))
    tokenizer = load_tokenizer(borrowed.folder)
    config = AutoConfig.for_model(**shape)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, tokenizer, digest_of([shape, borrowed.fingerprint])
