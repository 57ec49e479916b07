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

from evals.visible import visible
from src.config.main import main
from src.config.settings import CalibrateSettings
from src.errors import InputError


def make(cfg: CalibrateSettings) -> int:
    """The job: fit, save, print the file."""
    from evals.pocket import passage  # torch, transformers: not before the settings are right
    from src.config.binding import shape_of
    from src.kv.codebooks import default_path, made_for, save_codebooks
    from src.models.codebooks import fit_codebooks, refuse_unwritable, sample_keys
    from src.models.load import load_model

    loaded = load_model(cfg.model)
    shape = shape_of(loaded)
    if shape.head_dim % cfg.groups:
        raise InputError(f"groups={cfg.groups}: does not divide the head size {shape.head_dim}; valid: a divisor of it")
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
    sys.exit(main("calibrate", make))
