"""The old name of `src.engine.attention`, for scripts outside this project that still import it."""

from src.engine.attention import NAME, forward

__all__ = ["NAME", "forward"]
