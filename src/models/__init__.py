"""From a name or a folder to a model that the engine serves."""

from src.models.load import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
