"""Codebooks for product-quantised keys (HCAttention), fitted once per model and kept in the user's cache folder:

    python -m src.calibrate model=smollm2-135m groups=32 centroids=256

One codebook per layer, KV head and group of dimensions: keys of different layers and heads have little in common,
and the choice is ours (the paper's is not known). Keys are taken after the rotary embedding, as they are cached.
The fit is scikit-learn's MiniBatchKMeans, at most 200 iterations, batches of 10,000, on the keys of three samples
of text, as the paper has it; the text is prose that every Python ships.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from evals.visible import visible
from src.engine import attention
from src.errors import InputError
from src.kv.codebooks import default_path, made_for, part_of, save_codebooks


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


def make(cfg: DictConfig) -> int:
    """The job: fit, save, print the file."""
    from evals.pocket import passage
    from src.config.binding import shape_of
    from src.config.rules import check_settings
    from src.models.load import load_model

    check_settings(cfg, needed=("model",))
    if not 0 <= cfg.seed < 2**32:
        raise InputError(f"seed={cfg.seed}: valid: 0 to {2**32 - 1}")
    loaded = load_model(OmegaConf.to_container(cfg.model, resolve=True))  # type: ignore[arg-type]
    shape, tokens = shape_of(loaded), cfg.samples * cfg.sample_tokens
    if cfg.groups < 1 or shape.head_dim % cfg.groups:
        raise InputError(f"groups={cfg.groups}: does not divide the head size {shape.head_dim}; valid: a divisor of it")
    if not 2 <= cfg.centroids <= min(tokens, 2**15):
        raise InputError(f"centroids={cfg.centroids}: valid: 2 to {min(tokens, 2**15)} (sampled tokens, 15 bits)")
    file = Path(cfg.output).expanduser() if cfg.output else default_path(shape.name, cfg.groups, cfg.centroids)
    if os.path.exists(file) and not cfg.overwrite:
        if made_for(file, shape, cfg.groups, cfg.centroids):
            print(f"there already: {visible(str(file))} (overwrite=true fits anew)")
            return 0
        if cfg.output:
            raise InputError(
                f"output={file}: holds something else than codebooks of this model and these settings; "
                "valid: another file, or overwrite=true"
            )
    refuse_unwritable(file, 4 * shape.layers * shape.kv_heads * cfg.centroids * shape.head_dim)
    texts = []
    for number in range(cfg.samples):
        text = "\n".join(passage(random.Random(f"{cfg.seed} {number}"), 8 * cfg.sample_tokens))
        ids = loaded.tokenizer.encode(text, add_special_tokens=False)[: cfg.sample_tokens]
        texts.append(loaded.fit_ids(ids))
    keys = sample_keys(loaded.model, texts)
    if not all(layer.isfinite().all() for layer in keys):
        raise InputError(f"model={shape.name}: its keys are not all finite numbers; are the weights damaged?")
    centroids = fit_codebooks(keys, cfg.groups, cfg.centroids, cfg.seed, cfg.jobs)
    save_codebooks(file, centroids, shape, tokens=sum(map(len, texts)), seed=cfg.seed, text="pydoc_data.topics")
    print(f"codebooks: {visible(str(file))}")
    return 0


if __name__ == "__main__":
    from src.config.main import main

    sys.exit(main("calibrate", make))
