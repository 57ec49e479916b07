"""Tokens in, tokens out: one prefill per prompt, every cell forked, lanes decoded together."""

from src.engine.engine import Engine

__all__ = ["Engine"]
