"""Which of its tokens a policy attended to that chooses at each step (`read`): `chosen/<task>-<id>.npz`.

Written into a run's folder with `retention=positions`, one file per sample, beside what retention.npz says was kept:

    positions   (layers, kv_heads, k) original positions, as cached at the end; -1 where a layer or head holds fewer
    picks       (layers, kv_heads, k) how often each was attended to, by all steps and query heads together
    prompt_tokens, steps    positions below the first are the prompt's; tokens that were read one by one
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.engine.request import Generation
from src.errors import InputError
from src.files import Npz, file_name, write_npz
from src.records.record import Record
from src.retention.trace import CHOSEN


def save_chosen(run: Path, task: str, sample: str, result: Generation, prompt_tokens: int) -> None:
    """Whole or not at all; nothing where the policy does not choose."""
    if not result.picks:
        return
    write_npz(
        chosen_path(run, task, sample),
        positions=stacked(result.kept_end, -1).numpy(),
        picks=stacked(result.picks, 0).numpy(),
        prompt_tokens=np.array(prompt_tokens),
        steps=np.array(result.decode_steps),
    )


def stacked(layers: Sequence[Tensor], value: int) -> Tensor:
    """`(kv_heads, k)` each, padded with `value` to the longest layer."""
    longest = max(layer.shape[1] for layer in layers)
    return torch.stack([F.pad(layer, (0, longest - layer.shape[1]), value=value) for layer in layers])


def chosen_path(run: Path, task: str, sample: str) -> Path:
    return run / CHOSEN / f"{file_name(task, sample)}.npz"


def has_chosen(run: Path, record: Record) -> bool:
    """Is a readable file there of a sample whose policy chose? Always true of the others."""
    if not record.measures.get("chosen_positions"):
        return True
    try:
        with Npz(chosen_path(run, record.task, record.id)) as found:
            return all(found[name].size for name in ("positions", "picks", "prompt_tokens", "steps"))
    except (OSError, InputError):
        return False
