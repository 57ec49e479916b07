"""What is cached as the output grows, of one sample: `kept_over_time/<task>-<id>.npz`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.errors import InputError
from src.files import Npz, file_name, write_npz

BINS = 256  # at most, over prompt and output


@dataclass
class Trace:
    """Shares of the text's positions that were cached, mean over layers and KV heads.

    Attributes:
        prompt_tokens: the first output token has this position.
        width: positions per bin.
        every: output tokens between two rows.
        steps: output tokens read so far, one per row.
        shares: rows of `(bins,)`, 0 to 1.
    """

    prompt_tokens: int
    width: int
    every: int = 1
    steps: list[int] = field(default_factory=list)
    shares: list[np.ndarray] = field(default_factory=list)

    def note(self, step: int, kept: Sequence[Tensor], attended: Sequence[Tensor] | None = None) -> None:
        """`kept`: per layer, original positions `(kv_heads, k)`, -1 where there is none; `attended`: what share of each
        counts, all without.
        """
        heads = sum(layer.shape[0] for layer in kept)
        total = torch.zeros(BINS, dtype=torch.float64)
        for i, layer in enumerate(kept):
            there = layer >= 0
            share = None if attended is None else attended[i][there].double()
            total += torch.bincount(layer[there] // self.width, share, minlength=BINS).cpu()
        self.steps.append(step)
        self.shares.append((total / (heads * self.width)).numpy())

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        shares = np.array(self.shares, dtype=np.float32).reshape(-1, BINS)
        numbers = np.array([self.prompt_tokens, self.width, self.every])
        write_npz(path, shares=shares, steps=np.array(self.steps, dtype=int), numbers=numbers)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Raises InputError for a file that is damaged or of another version."""
        try:
            with Npz(path) as found:
                prompt_tokens, width, every = found["numbers"].tolist()
                return cls(prompt_tokens, width, every, found["steps"].tolist(), list(found["shares"]))
        except (OSError, ValueError, TypeError, InputError):
            raise InputError(f"{path}: not a trace of kept positions (or damaged); run it again") from None


def trace_path(run: Path, task: str, sample: str) -> Path:
    return run / TRACES / f"{file_name(task, sample)}.npz"


def made_with(path: Path, every: int) -> bool:
    """Is there a readable trace with this interval?"""
    try:
        return Trace.load(path).every == every
    except InputError:
        return False


TRACES, CHOSEN = (
    "kept_over_time",
    "chosen",
)  # folders of small files, see src/report/kept_over_time.py and src/session/chosen.py
