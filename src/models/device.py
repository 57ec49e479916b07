"""Where a model runs, and in which precision."""

import torch

from evals.visible import reason
from src.errors import InputError


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("its kernels lack float64, in which positions are rotated and fidelity is summed")
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"model.device={name}: not available here ({reason(error)}); valid: auto, cpu, cuda, cuda:N"
        ) from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of a `model.dtype` (`src.models.settings.DTYPES`, or auto)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, name)
    return found
