"""The model as transformers runs it, with its own attention: what benchmarks compare a prefill with."""

from __future__ import annotations

import time
from typing import Any

import torch

from src.engine.memory import MemoryMeter


class Plain:
    """Times and, on CUDA, peak memory of a plain prefill.

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
