"""Is every setting of the right kind? Asked before anything is loaded, so that a typo costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evals.metrics import EDIT_SIMILARITIES
from evals.suites import BROKEN_ROWS, check_choice
from evals.templates import THINKING, is_date
from src.errors import InputError
from src.retention.store import MODES as RETENTION
from src.tracking.wandb import MODES as WANDB

MOST = 2**63 - 1  # of whole numbers: what tensors hold
Rule = tuple[Callable[[Any], bool], str]  # is it valid? and what would be


def whole(least: int | None = None, or_null: str = "") -> Rule:
    def valid(value: Any) -> bool:
        if value is None:
            return bool(or_null)
        return type(value) is int and abs(value) <= MOST and (least is None or value >= least)

    wanted = "a whole number" if least is None else f"a whole number, {least} or more"
    return valid, wanted + (f", or null: {or_null}" if or_null else "")


def one_of(choices: tuple[str, ...]) -> Rule:
    return lambda value: value in choices, ", ".join(choices)


def texts(or_null: str = "") -> Rule:
    def valid(value: Any) -> bool:
        return (value is None and bool(or_null)) or (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        )

    return valid, "a list of names, e.g. [first,second]" + (f", or null: {or_null}" if or_null else "")


def text(or_null: str = "") -> Rule:
    def valid(value: Any) -> bool:
        return (value is None and bool(or_null)) or (isinstance(value, str) and bool(value))

    return valid, "a name or path" + (f", or null: {or_null}" if or_null else "")


SWITCH: Rule = (lambda value: isinstance(value, bool), "true, false")
SECONDS: Rule = (
    lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0,
    "seconds, more than 0",
)
BENCH_PARTS = ("prefill", "decode", "grid", "bytes", "peak", "peers")
LENGTHS: Rule = (
    lambda value: isinstance(value, list) and bool(value) and all(type(n) is int and n >= 2 for n in value),
    "a list of token counts, e.g. [1024,4096]",
)
RULES: dict[str, Rule] = {
    "parts": (
        lambda value: isinstance(value, list) and bool(value) and all(part in BENCH_PARTS for part in value),
        f"a list of {', '.join(BENCH_PARTS)}",
    ),
    "prompt_tokens": LENGTHS,
    "groups": whole(1),
    "centroids": whole(2),
    "samples": whole(1),
    "sample_tokens": whole(1),
    "jobs": (lambda value: type(value) is int and value != 0, "a number of processes, or -1: one per core"),
    "output": text("the cache folder"),
    "grid_tokens": whole(2),
    "grid_prompts": whole(1),
    "new_tokens": whole(2),
    "repeats": whole(1),
    "limit": whole(1, "every sample"),
    "lanes": whole(1),
    "max_lanes": whole(1),
    "seed": whole(),
    "prompt_scope": one_of(("whole", "context")),
    "fidelity": SWITCH,
    "max_new_tokens": whole(1, "what each task says"),
    "min_new_tokens": whole(0, "what each task says"),
    "edit_similarity": one_of(EDIT_SIMILARITIES),
    "broken_rows": one_of(BROKEN_ROWS),
    "retention": (lambda value: value in RETENTION or value is False, ", ".join(RETENTION)),  # YAML: off = false
    "kept_over_time": whole(0),
    "output_root": text(),
    "overwrite": SWITCH,
    "tasks.names": texts("all of the suite"),
    "tasks.data_dir": text("the suite's own place"),
    "model.name": text("the path's last part"),
    "model.max_prompt_tokens": whole(2, "derived from the context length"),
    "model.context_length": whole(2, "what the model's config says"),
    "model.chat": SWITCH,
    "model.chat_template": text("the tokenizer's own"),
    "model.template_kwargs": (lambda value: isinstance(value, dict), "a mapping, e.g. {enable_thinking: false}"),
    "model.thinking": (lambda value: value in THINKING or value is False, ", ".join(THINKING)),  # YAML: off = false
    "model.date": (is_date, "a date as YYYY-MM-DD"),
    "model.stop_tokens": texts(),
    "model.trust_remote_code": SWITCH,
    "model.self_check": SWITCH,
    "wandb.mode": one_of(WANDB),
    "wandb.project": text("the key's default"),
    "wandb.entity": text("the key's default"),
    "wandb.group": text("none"),
    "wandb.tags": texts(),
    "wandb.init_timeout": SECONDS,
    "wandb.finish_timeout": SECONDS,
    "wandb.table_rows": whole(0),
}
GROUPS = ("policy", "model", "tasks", "wandb")


def check_settings(cfg: DictConfig, needed: tuple[str, ...] = ("model", "tasks")) -> None:
    """Raise for the first setting that is not of its kind.

    Args:
        needed: groups that must be there.

    Raises:
        InputError, DataError: it names the setting, its value and what would be valid.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    for group in GROUPS:
        if not isinstance(plain.get(group, {}), dict):
            raise InputError(f"{group}={plain[group]}: valid: a name of the group; see --help")
    for group in needed:
        if group not in plain:
            raise InputError(f"{group}=null: valid: a name of the group; see --help")
    model = plain.get("model", {})
    if model.get("layers") is not None and not model.get("like"):
        raise InputError(f"model.layers={shown(model['layers'])}: only with model=random; valid: null")
    for name, (valid, wanted) in RULES.items():
        value: Any = plain
        for part in name.split("."):
            if part not in value:
                break  # a key that this config does not have
            value = value[part]
        else:
            if not valid(value):
                raise InputError(f"{name}={shown(value)}: valid: {wanted}")
    if "tasks" in plain:
        tasks = dict(plain["tasks"])
        suite, names, _ = tasks.pop("suite"), tasks.pop("names"), tasks.pop("data_dir")
        check_choice(suite, names, tasks)


def shown(value: Any) -> str:
    """As one would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
