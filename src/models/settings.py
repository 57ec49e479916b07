"""The settings of a model, before anything of it is loaded: conf/model. Light: torch comes when a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml

from evals.templates import THINKING, is_date
from src.errors import InputError
from src.kv.checks import Rule, check_fields, one_of, shown, text, texts, whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
DTYPES = ("float32", "bfloat16", "float16")
MAPPING = Rule(lambda value: isinstance(value, dict), "a mapping, e.g. {enable_thinking: false}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A `conf/model` file; `_base.yaml` explains every key.

    Raises:
        InputError: a value that is not of its kind, or does not go with the others.
    """

    name: Annotated[str | None, text("the path's last part")]
    hub_id: str | None
    path: str | None
    revision: str
    package_file: str | None
    like: str | None
    layers: int | None
    dtype: str
    device: str
    stop_tokens: Annotated[list[str], texts()]
    context_length: Annotated[int | None, whole(2, "what the model's config says")]
    max_prompt_tokens: Annotated[int | None, whole(2, "derived from the context length")]
    chat: bool
    chat_template: Annotated[str | None, text("the tokenizer's own")]
    template_kwargs: Annotated[dict[str, Any], MAPPING]
    thinking: Annotated[str, one_of(THINKING)]
    date: Annotated[str, Rule(is_date, "a date as YYYY-MM-DD")]
    self_check: bool
    trust_remote_code: bool
    shape: dict[str, Any] | None

    def __post_init__(self) -> None:
        if self.layers is not None and not self.like:
            raise InputError(f"model.layers={shown(self.layers)}: only with model=random; valid: null")
        check_fields(self, "model.")
        if str(self.dtype) not in ("auto", *DTYPES):
            raise InputError(f"model.dtype={self.dtype}: valid are auto, {', '.join(DTYPES)}")
        if self.like:
            self.random_shape()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ModelSettings:
        """Keys left out have the values of `_base.yaml`; keys of no field are not looked at."""
        whole = {**read_yaml("_base"), **given}
        if whole["thinking"] is False:
            whole["thinking"] = "off"  # as YAML reads a bare `off`
        return cls(**{setting.name: whole[setting.name] for setting in fields(cls)})

    def random_shape(self) -> dict[str, Any]:
        """What transformers' config is made of where the weights are random.

        Raises:
            InputError: `like` is no model here with a shape, or the shape has not so many layers.
        """
        shapes = {name: found for name in model_names() if (found := read_yaml(name).get("shape"))}
        if self.like not in shapes:
            raise InputError(f"model.like={self.like}: no such shape; valid: {', '.join(shapes)}")
        shape = dict(self.shape or shapes[self.like])
        if self.layers is not None:
            most = shape["num_hidden_layers"]
            if not isinstance(self.layers, int) or not 1 <= self.layers <= most:
                raise InputError(f"model.layers={self.layers}: valid are 1 to {most}, or null for all of them")
            shape["num_hidden_layers"] = self.layers
        return shape


def model_names() -> list[str]:
    """The valid values of `model=`."""
    return sorted(path.stem for path in CONF.glob("*.yaml") if not path.stem.startswith("_"))


def model_settings(name: str, **overrides: Any) -> dict[str, Any]:
    """The content of one `conf/model` file with its base, for callers without Hydra."""
    if name not in model_names():
        raise InputError(f"model={name}: unknown model; valid: {', '.join(model_names())}")
    return {**read_yaml("_base"), **read_yaml(name), **overrides}


def model_name(settings: ModelSettings) -> str:
    """The name in folders and tables: known before anything is loaded. Random weights show in it."""
    if settings.name:
        return settings.name
    if settings.like:
        layers = f"-{settings.layers}layers" if settings.layers else ""
        return f"random-{settings.like}{layers}"
    if settings.path:
        return Path(str(settings.path)).resolve().name.removesuffix(".gguf")
    if settings.hub_id:
        return str(settings.hub_id).rsplit("/", 1)[-1].lower()
    raise InputError("model.path=null: give model.path=FOLDER (or model.hub_id=OWNER/NAME)")


def read_yaml(name: str) -> dict[str, Any]:
    """A file of conf/model as it stands, without its base."""
    settings: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    settings.pop("defaults", None)
    return settings


def prompt_limit(value: int | None, context: int) -> int:
    """LongBench's limit for this context: 4096 -> 3500, 8192 -> 7500, 16384 -> 15500."""
    limit = int(value) if value else max(context - 590, context // 2) // 500 * 500 or context // 2
    if not 0 < limit < context:
        raise InputError(f"model.max_prompt_tokens={limit}: must be above 0 and below the context of {context} tokens")
    return limit


def context_length(settings: ModelSettings, config: PreTrainedConfig) -> int:
    """Positions the model was made for: the setting, or what its config (for text, if it has several) says."""
    said = settings.context_length or getattr(config.get_text_config(), "max_position_embeddings", None)
    if not said:
        raise InputError(
            "model.context_length=null: the model's config has no max_position_embeddings; "
            "valid: the number of positions it was trained for"
        )
    return int(said)
