"""What a method learns once per model: codebooks for product-quantised keys (`src.kv.codebooks`).

Keys are taken after the rotary embedding, as they are cached. The fit is scikit-learn's MiniBatchKMeans, at most 200
iterations, batches of 10,000.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor

from src.engine import attention
from src.errors import InputError
from src.kv.codebooks import part_of


def refuse_unwritable(file: Path, size: int) -> None:
    """Before the long fit: can a file of `size` bytes be written there?

    Raises:
        InputError: it cannot.
    """
    if os.path.isdir(file):
        raise InputError(f"output={file}: a folder; valid: a file")
    with part_of(file) as part, part.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, size)


class KeyCollector:
    """Stands where lanes stand: attends in full and keeps every layer's keys, `(kv_heads, n, head_dim)`."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.keys: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, whole: Any) -> Tensor:
        self.keys.append(key[0].float().cpu())
        return whole(query, key, value)


@torch.inference_mode()
def sample_keys(model: Any, texts: list[list[int]]) -> list[Tensor]:
    """Keys of every layer over all texts (token ids), `(kv_heads, tokens, head_dim)` each."""
    model.set_attn_implementation(attention.NAME)
    parts: list[list[Tensor]] = []
    for ids in texts:
        collector = KeyCollector(len(ids))
        positions = torch.arange(len(ids), device=model.device)[None]
        batch = torch.tensor([ids], device=model.device)
        attention.forward(model, batch, positions, collector, logits_to_keep=1)
        parts.append(collector.keys)
    return [torch.cat(layer, dim=1) for layer in zip(*parts, strict=True)]


def fit_codebooks(keys: list[Tensor], groups: int, centroids: int, seed: int, jobs: int = 1) -> Tensor:
    """`(layers, kv_heads, g, c, head_dim / g)` from keys as `sample_keys` returns them."""
    layers, kv_heads, _, dim = len(keys), *keys[0].shape
    parts = [layer[head].unflatten(-1, (groups, -1))[:, i].numpy() for layer in keys for head in range(kv_heads)
             for i in range(groups)]  # fmt: skip
    found: list[np.ndarray] = []
    for layer in range(layers):
        mine = parts[layer * kv_heads * groups : (layer + 1) * kv_heads * groups]
        found += Parallel(n_jobs=jobs)(delayed(fit_one)(part, centroids, seed) for part in mine)
        print(f"\rlayer {layer + 1} of {layers}", end="\n" if layer + 1 == layers else "", file=sys.stderr, flush=True)
    return torch.tensor(np.stack(found)).view(layers, kv_heads, groups, centroids, dim // groups)


def fit_one(points: np.ndarray, centroids: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    means = MiniBatchKMeans(centroids, max_iter=200, batch_size=10_000, n_init=1, random_state=seed)
    return means.fit(np.ascontiguousarray(points)).cluster_centers_.astype(np.float32)
