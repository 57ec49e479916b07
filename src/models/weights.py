"""A model from its files: configuration, tokenizer and safetensors. No pickle is ever opened."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from evals.visible import reason
from src.errors import InputError
from src.models.embedded import package_file, unpacked
from src.models.fingerprint import ModelFiles, read_files
from src.models.hub import snapshot
from src.models.settings import ModelSettings

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_weights(settings: ModelSettings) -> tuple[ModelFiles, str]:
    """The files to load from (path, installed package or hub, in this order) and a name for the record."""
    with_code = settings.trust_remote_code
    if settings.path:
        path = Path(str(settings.path)).expanduser()
        if path.is_file() and path.suffix == ".gguf":
            return unpacked(path), str(path)
        if not path.is_dir():
            raise InputError(
                f"model.path={path}: no such folder; it must hold config.json, a tokenizer and *.safetensors"
            )
        return read_files(check_folder(path), with_code), str(path)
    if settings.package_file:
        return unpacked(package_file(str(settings.package_file))), str(settings.package_file)
    if settings.hub_id:
        folder = snapshot(settings.hub_id, settings.revision, with_code)
        return read_files(check_folder(folder), with_code), f"{settings.hub_id}@{folder.name}"
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
