"""The old place of tests/support/tiny.py, for scripts outside this project that borrow its models."""

from tests.support.tiny import ARCHITECTURES, SHAPE, scale_weights, tiny, tiny_loaded, tiny_tokenizer, tokens

__all__ = ["ARCHITECTURES", "SHAPE", "scale_weights", "tiny", "tiny_loaded", "tiny_tokenizer", "tokens"]
