"""The old name of `src.engine.request`, for scripts outside this project that still import it."""

from src.engine.request import Generation, Job, Request, Variant

__all__ = ["Generation", "Job", "Request", "Variant"]
