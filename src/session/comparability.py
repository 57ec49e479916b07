"""What a results folder's hash is made of, and what must be equal for two runs' numbers to be comparable.

Pure functions of a run's or sweep's config, the loaded model and the cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals.suites import SUITES
from src.config.cells import CellConfig
from src.config.settings import SessionSettings
from src.models.load import LoadedModel


def outcome_settings(cfg: SessionSettings, model: LoadedModel, cell: CellConfig) -> dict[str, Any]:
    """Every setting that changes a sample's outcome; `limit` and most of `tasks` only choose samples."""
    return {
        "policy": cell.settings,
        **cell.found,
        "budget": cell.budget,
        "model": {
            "name": model.name,
            "source": model.source,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "chat": model.chat,
            "chat_template": cfg.model.chat_template,
            "template_kwargs": dict(model.form.kwargs),
            **model.form.settings,
            "stop_ids": sorted(model.stop_ids),
            "max_prompt_tokens": model.max_prompt_tokens,
        },
        "seed": cfg.seed,
        "prompt_scope": cfg.prompt_scope,
        "max_new_tokens": cfg.max_new_tokens,
        **min_new_tokens(cfg),
        "edit_similarity": cfg.edit_similarity,
        **deciding_options(cfg),
    }


def min_new_tokens(cfg: SessionSettings) -> dict[str, int]:
    """Only where it was set, so that folders of the usual runs keep their names."""
    return {} if cfg.min_new_tokens is None else {"min_new_tokens": cfg.min_new_tokens}


def deciding_options(cfg: SessionSettings) -> dict[str, dict[str, Any]]:
    """What a suite leaves to its user (metric, template, ...); nothing for those with a protocol, as before."""
    said = {name: cfg.tasks.options.get(name) for name in SUITES[cfg.tasks.suite].deciding}
    return {"tasks": said} if said else {}


def comparability(
    cfg: SessionSettings, model: LoadedModel, task_versions: Mapping[str, int], beyond_context: bool
) -> dict[str, Any]:
    """`comparability` in metrics.json; a report refuses runs that differ in it.

    Args:
        beyond_context: texts may go beyond the positions that the model was made for.
    """
    return {
        "max_prompt_tokens": model.max_prompt_tokens,
        "chat_template": model.chat,
        **model.form.settings,
        **({"thinking": model.form.thinking_note} if model.form.thinking_note else {}),
        "rouge": "rouge 1.0.1",
        "edit_similarity": cfg.edit_similarity,
        "prompt_scope": cfg.prompt_scope,
        "max_new_tokens": cfg.max_new_tokens,
        **min_new_tokens(cfg),
        **deciding_options(cfg),
        **({"beyond_context": True} if beyond_context else {}),
        "random_weights": model.random_weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": model.source,
        "model_fingerprint": model.fingerprint,
        "task_versions": dict(task_versions),
    }
