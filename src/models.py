"""Load a model and its tokenizer: from the hub, a folder, the embedded weights, or with random weights.

Weights are read from safetensors only (or an unpacked GGUF file): no pickle is ever opened.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from evals.visible import reason
from src.chat import ChatForm, chat_form, thinking_mode
from src.embedded import cache_folder, package_file, unpacked
from src.errors import InputError
from src.fingerprint import ModelFiles, digest_of, read_files
from src.hub import snapshot
from src.layer_kinds import TextLengths, check_kinds, check_lengths, text_limits
from src.self_check import check_once

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[1] / "conf" / "model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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

    def fit_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids modulo the vocabulary: the same ids for every real model.

        A random model borrows the embedded model's tokenizer, whose vocabulary may be the larger one.
        """
        return [i % self.vocab_size for i in ids]


def load_model(cfg: Mapping[str, Any] | DictConfig) -> LoadedModel:
    """Load what a `conf/model` file describes. Keys left out have the values of `_base.yaml`."""
    settings = {**read_yaml("_base"), **as_dict(cfg)}
    transformers_logging.disable_progress_bar()
    name = model_name(settings)
    device = choose_device(str(settings["device"]))
    dtype = choose_dtype(str(settings["dtype"]), device)
    files: ModelFiles | None = None
    if settings["like"]:
        model, tokenizer, settings = build_random(settings, dtype, device)
        source = f"random weights in the shape of {settings['like']}"
        fingerprint = str(settings["fingerprint"])
    else:
        files, source = find_weights(settings)
        folder, fingerprint = files.folder, files.fingerprint
        tokenizer = load_tokenizer(folder, bool(settings["trust_remote_code"]))
        config = load_config(folder, bool(settings["trust_remote_code"]))
        check_config(config, settings, folder)
        model = load_weights(folder, dtype, device, bool(settings["trust_remote_code"]))
        files.refuse(files.changed())
    model.eval().requires_grad_(False)
    if settings["chat_template"]:
        tokenizer.chat_template = settings["chat_template"]
    if settings["chat"] and not tokenizer.chat_template:
        raise InputError(
            f"model.chat=true: the tokenizer of {name} has no chat template; "
            "set model.chat=false (a base model) or model.chat_template"
        )
    form = ChatForm(dict(settings["template_kwargs"] or {}), thinking_mode(settings["thinking"]))
    if settings["chat"]:
        form = chat_form(tokenizer, settings, name)
    context = context_length(settings, model.config)
    limit = prompt_limit(settings["max_prompt_tokens"], context)
    check_lengths(TextLengths.of(model).limits, limit)
    self_check(model, settings)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        # Random weights never mean to stop, and a run that times them should not stop by chance.
        stop_ids=frozenset() if settings["like"] else stop_ids(model, tokenizer, settings["stop_tokens"]),
        max_prompt_tokens=limit,
        context_length=context,
        random_weights=bool(settings["like"]),
        dtype=dtype,
        device=device,
        chat=bool(settings["chat"]),
        form=form,
        source=source,
        fingerprint=fingerprint,
        files=files,
    )


# ---- settings ------------------------------------------------------------------------------------------


def model_names() -> list[str]:
    """The valid values of `model=`."""
    return sorted(path.stem for path in CONF.glob("*.yaml") if not path.stem.startswith("_"))


def model_settings(name: str, **overrides: Any) -> dict[str, Any]:
    """The settings of one `conf/model` file with its base, for callers without Hydra."""
    if name not in model_names():
        raise InputError(f"model={name}: unknown model; valid: {', '.join(model_names())}")
    return {**read_yaml("_base"), **read_yaml(name), **overrides}


def model_name(cfg: Mapping[str, Any] | DictConfig) -> str:
    """The name in folders and tables: known before anything is loaded. Random weights show in it."""
    settings = as_dict(cfg)
    if settings.get("name"):
        return str(settings["name"])
    if settings.get("like"):
        layers = f"-{settings['layers']}layers" if settings.get("layers") else ""
        return f"random-{settings['like']}{layers}"
    if settings.get("path"):
        return Path(str(settings["path"])).resolve().name.removesuffix(".gguf")
    if settings.get("hub_id"):
        return str(settings["hub_id"]).rsplit("/", 1)[-1].lower()
    raise InputError("model.path=null: give model.path=FOLDER (or model.hub_id=OWNER/NAME)")


def read_yaml(name: str) -> dict[str, Any]:
    settings = as_dict(OmegaConf.load(CONF / f"{name}.yaml"))
    settings.pop("defaults", None)
    return settings


def as_dict(cfg: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    return dict(plain)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("its kernels lack float64, in which positions are rotated and fidelity is summed")
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"model.device={name}: not available here ({reason(error)}); valid: auto, cpu, cuda, cuda:N"
        ) from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"model.dtype={name}: valid are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def prompt_limit(value: int | None, context: int) -> int:
    """LongBench's limit for this context: 4096 -> 3500, 8192 -> 7500, 16384 -> 15500."""
    limit = int(value) if value else max(context - 590, context // 2) // 500 * 500 or context // 2
    if not 0 < limit < context:
        raise InputError(f"model.max_prompt_tokens={limit}: must be above 0 and below the context of {context} tokens")
    return limit


def context_length(settings: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """Positions the model was made for: the setting, or what its config (for text, if it has several) says."""
    said = settings["context_length"] or getattr(config.get_text_config(), "max_position_embeddings", None)
    if not said:
        raise InputError(
            "model.context_length=null: the model's config has no max_position_embeddings; "
            "valid: the number of positions it was trained for"
        )
    return int(said)


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


def find_weights(settings: Mapping[str, Any]) -> tuple[ModelFiles, str]:
    """The files to load from (path, installed package or hub, in this order) and a name for the record."""
    with_code = bool(settings["trust_remote_code"])
    if settings["path"]:
        path = Path(str(settings["path"])).expanduser()
        if path.is_file() and path.suffix == ".gguf":
            return unpacked(path), str(path)
        if not path.is_dir():
            raise InputError(
                f"model.path={path}: no such folder; it must hold config.json, a tokenizer and *.safetensors"
            )
        return read_files(check_folder(path), with_code), str(path)
    if settings["package_file"]:
        return unpacked(package_file(str(settings["package_file"]))), str(settings["package_file"])
    if settings["hub_id"]:
        folder = snapshot(settings["hub_id"], settings["revision"], with_code)
        return read_files(check_folder(folder), with_code), f"{settings['hub_id']}@{folder.name}"
    raise InputError("model.path=null: give model.path=FOLDER (or model.hub_id=OWNER/NAME)")


def check_folder(folder: Path) -> Path:
    """The folder; says what it lacks before anything is read from it."""
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        reason = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "no *.safetensors"
        raise InputError(
            f"{folder}: {reason}; convert it with save_pretrained, or choose a model with safetensors weights"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json; a model folder holds it beside the weights")
    return folder


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever it is, the folder lacks a tokenizer that this machine can read
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({reason(error)})") from error


def load_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged, or of a model that this transformers does not know
        raise InputError(f"{folder}: cannot be loaded ({reason(error)})") from error
    return config


def check_config(config: PreTrainedConfig, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse what cannot be served before its weights are read."""
    try:
        check_kinds(config)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    limit = prompt_limit(settings["max_prompt_tokens"], context_length(settings, config))
    check_lengths(text_limits(config), limit)


def self_check(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """The full cache against the plain model (`src.self_check`), or a look at the layers only."""
    # Random weights mean nothing, and with billions of them a CPU would need minutes.
    huge = settings["like"] and model.device.type == "cpu" and model.num_parameters() > 1e9
    try:
        check_once(model, cache_folder() / "self-check", compare=bool(settings["self_check"]) and not huge)
    except InputError as error:
        raise InputError(f"{model_name(settings)}: {error}") from None


def load_weights(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=dtype,
            device_map=None if device.type == "cpu" else device,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds for a model it does not know or cannot read
        raise InputError(f"{folder}: cannot be loaded ({reason(error)})") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers would only warn, and fill in random numbers
        raise InputError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    if not can_plug_in(model):
        raise InputError(
            f"{folder}: model type {model.config.model_type} computes attention in code of its own, so no "
            "cache policy can be plugged in; valid: Llama, Mistral, Qwen, Gemma, Phi3 and others that use "
            "transformers' attention interface"
        )
    return model


def can_plug_in(model: PreTrainedModel) -> bool:
    """Whether transformers would let this model's attention be replaced; it only warns where it does not."""
    asked: Any = getattr(model, "_can_set_attn_implementation", None)
    return asked is None or bool(asked())


def build_random(
    settings: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Tokenizer, dict[str, Any]]:
    """Another model's real shape and limits with random weights and a borrowed tokenizer."""
    like = str(settings["like"])
    shaped = [name for name in model_names() if read_yaml(name).get("shape")]
    if like not in shaped:
        raise InputError(f"model.like={like}: no such shape; valid: {', '.join(shaped)}")
    original = read_yaml(like)
    shape = dict(settings["shape"] or original["shape"])
    if settings["layers"] is not None:
        layers = settings["layers"]
        if not isinstance(layers, int) or not 1 <= layers <= shape["num_hidden_layers"]:
            raise InputError(
                f"model.layers={layers}: valid are 1 to {shape['num_hidden_layers']}, or null for all of them"
            )
        shape["num_hidden_layers"] = layers
    borrowed = unpacked(package_file(str(settings["package_file"])))
    tokenizer = load_tokenizer(borrowed.folder)
    settings["fingerprint"] = digest_of([shape, borrowed.fingerprint])
    for key in ("context_length", "max_prompt_tokens"):
        settings[key] = settings[key] or original.get(key)
    config = AutoConfig.for_model(**shape)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, tokenizer, settings
