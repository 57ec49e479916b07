"""Codebooks of product-quantised keys: the file they are kept in, and whether it was made for a model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.errors import InputError
from src.files import cache_folder
from src.kv.state import ModelShape


@dataclass(frozen=True)
class Codebooks:
    """Centroids of one model, `(layers, kv_heads, g, c, head_dim / g)`, and the digest of the file."""

    centroids: Tensor
    digest: str


def default_path(model: str, groups: int, centroids: int) -> Path:
    """In the cache folder and nowhere else, whatever the name; a name that cannot stand as it is ends in its digest."""
    plain = re.sub(r"[^A-Za-z0-9._=+-]+", "_", model).strip("._")[:80]
    name = plain if plain == model else f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}".lstrip("-")
    return cache_folder() / "codebooks" / f"{name}-g{groups}-c{centroids}.safetensors"


def load_codebooks(path: str | None, model: ModelShape, groups: int, centroids: int) -> Codebooks:
    """The codebooks of a file, on the model's device and in its precision.

    Raises:
        InputError: no such file, or one of another model or other dimensions.
    """
    file = Path(path).expanduser() if path else default_path(model.name, groups, centroids)
    if not file.is_file():
        raise InputError(
            f"policy.codebooks={path or 'null'}: no codebooks at {file}; valid: a file made by "
            f"`python -m src.calibrate model={model.name} groups={groups} centroids={centroids}`"
        )
    tensor, found, digest = read_codebooks(file, file.stat().st_mtime_ns)
    wanted = describe(model, groups, centroids)
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise InputError(
                f"policy.codebooks={file}: made for {name}={found.get(name)}, this run has {name}={wanted[name]}; "
                f"valid: codebooks from `python -m src.calibrate model={model.name} groups={groups} "
                f"centroids={centroids}`"
            )
    return Codebooks(tensor.to(model.device, model.dtype), digest)


@lru_cache(maxsize=8)
def read_codebooks(file: Path, changed: int) -> tuple[Tensor, dict[str, str], str]:
    """Tensor, metadata and digest; `changed` makes a rewritten file a new one."""
    try:
        with safe_open(file, "pt") as opened:
            tensor, found = opened.get_tensor("centroids"), opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"policy.codebooks={file}: not a codebook file ({str(error).splitlines()[0]})") from None
    return tensor, found, hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def made_for(file: Path, model: ModelShape, groups: int, centroids: int) -> bool:
    """Whether the file's codebooks are this model's. In the cache folder those of another checkpoint are replaced."""
    try:
        found = read_codebooks(file, file.stat().st_mtime_ns)[1]
    except InputError:
        return False
    return all(found.get(name) == value for name, value in describe(model, groups, centroids).items())


def describe(model: ModelShape, groups: int, centroids: int) -> dict[str, str]:
    """What must agree between a file and a run."""
    shape = {"model": model.name, "layers": model.layers, "kv_heads": model.kv_heads, "head_dim": model.head_dim}
    return {k: str(v) for k, v in {**shape, "weights": model.weights, "groups": groups, "centroids": centroids}.items()}


def save_codebooks(file: Path, tensor: Tensor, model: ModelShape, **more: Any) -> None:
    """`(layers, kv_heads, g, c, head_dim / g)`, with metadata that says what it is for; written whole."""
    found = describe(model, tensor.shape[2], tensor.shape[3]) | {k: str(v) for k, v in more.items()}
    with part_of(file) as part:
        save_file({"centroids": tensor.contiguous()}, part, {**found, "dtype": str(model.dtype).removeprefix("torch.")})
        part.replace(file)


@contextmanager
def part_of(file: Path) -> Iterator[Path]:
    """A name beside the file for what is not whole yet, gone at the end. Errors of writing are one line."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"output={file}: cannot be written ({reason}); valid: a file in a folder that can be written and has room "
            "(without output: XDG_CACHE_HOME)"
        ) from None
