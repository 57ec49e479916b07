"""The model of a process: kept for the next job of a multirun (`-m`), loaded again if its files changed."""

from __future__ import annotations

import json
from functools import lru_cache

from src.models.load import LoadedModel, load_model


@lru_cache(maxsize=1)
def loaded(model: str) -> LoadedModel:
    """The model of a config given as JSON; kept for the next job of the same process (`-m`)."""
    loaded.cache_clear()  # the one before goes first: two may not fit on a device
    return load_model(json.loads(model))


def current(model: str) -> LoadedModel:
    """The same; loaded again if its files changed since the job before."""
    if (files := loaded(model).files) and files.changed():
        loaded.cache_clear()
    return loaded(model)
