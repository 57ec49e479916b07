"""From a name or a folder to a model that the engine serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from src.models.load import LoadedModel
    from src.models.settings import ModelSettings


def load_model(settings: ModelSettings | Mapping[str, Any]) -> LoadedModel:
    """Load what a `conf/model` file describes (`src.models.load`, which brings torch and transformers)."""
    from src.models.load import load_model

    return load_model(settings)
