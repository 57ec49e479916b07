"""The settings of a model, before anything of it is loaded: its name, device, precision and limits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedConfig

from evals.visible import reason
from src.errors import InputError

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
