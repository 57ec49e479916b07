"""Whose fault an exception is, and the one line that its author can act on. Every hook is asked through `ask`."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from src.errors import InputError

LONGEST = 300  # characters of somebody else's message
RAISED = (Exception, SystemExit)  # what a policy's code may end with; Ctrl-C is the user's

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class ContractError(ValueError):
    """A policy handed back what it may not.

    Args:
        found: "gave ...; expected ...".
        hook: of the policy, where it is another one than the engine asked.
    """

    def __init__(self, found: str, hook: str = "") -> None:
        super().__init__(found)
        self.hook = hook


class Fault(Exception):
    """What a policy did wrong, as one line; its cause is what was raised."""


def ask(policy: object, hook: str, layer: int | None, question: Callable[..., Answer], *arguments: Any) -> Answer:
    """`question(*arguments)`: a policy's hook, and what checks its answer.

    Raises:
        Fault: the policy raised, or broke its contract. What is no fault of its own (`beyond_policy`) goes on as it is.
    """
    try:
        return question(*arguments)
    except RAISED as error:
        if beyond_policy(error):
            raise
        raise Fault(blame(policy, hook, layer, error)) from error


def beyond_policy(error: BaseException) -> bool:
    """Whether it is no fault of the policy that raised it: the model is refused, memory ran out, a device is lost."""
    if isinstance(error, InputError) or is_out_of_memory(error):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in said(error)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's allocator raises a class of its own; the driver, cuBLAS and the CPU's allocator only a message."""
    if isinstance(error, MemoryError):
        return True
    messages = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def blame(policy: object, hook: str, layer: int | None, error: BaseException) -> str:
    """One line about what a policy raised; its traceback goes to the log (level debug)."""
    log.debug("%s.%s", type(policy).__name__, hook, exc_info=error)
    where = [] if layer is None else [f"layer {layer}"]
    if isinstance(error, ContractError):
        return describe(policy, error.hook or hook, said(error), where)
    where.append(place(policy, error))
    message = said(error)
    return describe(policy, hook, f"raised {type(error).__name__}{': ' if message else ''}{message}", where)


def describe(policy: object, hook: str, what: str, where: Sequence[str]) -> str:
    """`policy H2O: evict gave ...; expected ... (layer 3)`."""
    return f"policy {type(policy).__name__}: {hook} {what}" + (f" ({', '.join(where)})" if where else "")


def said(error: BaseException) -> str:
    """An exception's message as one printable line; nothing if it has none."""
    try:
        text = " ".join(str(error).split())
    except RAISED:  # its author's mistake, too
        return ""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def place(policy: object, error: BaseException) -> str:
    """`file.py:line` that raised: the last line of the policy's own file, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    try:
        own = [frame for frame in frames if frame.filename == inspect.getfile(type(policy))]
    except (TypeError, OSError):  # a class made in a notebook
        own = []
    last = (own or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def show(value: Any) -> str:
    """What was found: shape and type of a tensor, else the value (shortened)."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, on {value.device}"
    text = f"{type(value).__name__} {value!r}" if value is not None else "None"
    return text if len(text) <= 80 else text[:77] + "..."
