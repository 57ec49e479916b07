"""The model as transformers runs it, with its own attention and its own cache: what benchmarks compare with."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache

from src.memory import MemoryMeter


class Plain:
    """Times and, on CUDA, peak memory of plain prefill and decoding.

    Attributes:
        memory: its `peaks` are those of the calls so far.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.memory = MemoryMeter(model.device)

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> float:
        """Seconds of the prompt's forward pass, without a cache."""
        self.model.set_attn_implementation("sdpa")
        batch = torch.tensor([ids], device=self.model.device)
        self.memory.start()
        started = time.perf_counter()
        logits = self.model(batch, use_cache=False, logits_to_keep=1).logits
        float(logits[0, -1, 0])
        taken = time.perf_counter() - started
        self.memory.stop("prefill")
        return taken

    @torch.inference_mode()
    def decode(self, ids: list[int], new_tokens: int) -> float:
        """Seconds per token after the first, greedily, with transformers' growing cache."""
        self.model.set_attn_implementation("sdpa")
        cache, batch = DynamicCache(), torch.tensor([ids], device=self.model.device)
        token = self.model(batch, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        self.memory.start()
        started = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = self.model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        int(token)
        taken = (time.perf_counter() - started) / (new_tokens - 1)
        self.memory.stop("decode")
        return taken
