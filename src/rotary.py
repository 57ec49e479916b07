"""The old name of `src.engine.rotary`, for scripts outside this project that still import it."""

from src.engine.rotary import Rotary

__all__ = ["Rotary"]
