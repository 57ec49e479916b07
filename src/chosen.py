"""Which tokens a policy attended to that keeps everything and chooses at each step: `chosen/<task>-<id>.npz`.

Written into a run's folder with `retention=positions`, one file per sample, beside what retention.npz says was kept:

    positions   (layers, kv_heads, k) original positions, as cached at the end
    picks       (layers, kv_heads, k) how often each was attended to, by all steps and query heads together
    prompt_tokens, steps    positions below the first are the prompt's; tokens that were read one by one
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from src.jobs import Generation
from src.records import CHOSEN
from src.run_files import file_name


def save_chosen(run: Path, task: str, sample: str, result: Generation, prompt_tokens: int) -> None:
    """Whole or not at all; nothing where the policy does not choose."""
    if not result.picks:
        return
    path = run / CHOSEN / f"{file_name(task, sample)}.npz"
    path.parent.mkdir(exist_ok=True)
    positions, picks = torch.stack(result.kept_end).numpy(), torch.stack(result.picks).numpy()
    with path.with_suffix(".part").open("wb") as file:
        np.savez_compressed(
            file,
            positions=positions,
            picks=picks,
            prompt_tokens=np.array(prompt_tokens),
            steps=np.array(result.decode_steps),
        )
    path.with_suffix(".part").replace(path)
