"""Decoding speed against the prompt's length, measured token by token in turn (a part of src.bench).

A machine's bad seconds are longer than a token, so whole generations one after the other meet different ones. Here
every prompt length has its cache ready, each takes one token, then all again: ratios are of neighbours in time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from evals.visible import visible
from src.engine.engine import Engine
from src.engine.memory import MemoryMeter
from src.engine.request import Job, Request, Variant

Step = Callable[[], None]
WARM_UP = 4  # tokens before any is counted
SPARE = WARM_UP + 1  # and the prefill's own: a request must allow so many more than are counted


@torch.inference_mode()
def plain_steps(model: Any, ids: list[int], memory: MemoryMeter) -> Step:
    """Reads the prompt; each call generates one token with transformers' attention and growing cache."""
    model.set_attn_implementation("sdpa")
    memory.start()
    cache, batch = DynamicCache(), torch.tensor([ids], device=model.device)
    token = model(batch, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    memory.stop("prefill")

    @torch.inference_mode()
    def step() -> None:
        nonlocal token
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        int(token)  # waits for the device

    return step


def lane_steps(engine: Engine, job: Job) -> Step:
    """Reads the prompt and cuts it; each call generates one token of the one lane."""
    return engine.begin(job).step


def in_turn(steps: Sequence[Step], tokens: int, warm_up: int = WARM_UP) -> list[list[float]]:
    """Seconds of every token, a list per step function; who goes first alternates."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(warm_up + tokens):
        order = range(len(steps)) if turn % 2 else reversed(range(len(steps)))
        for i in order:
            started = time.perf_counter()
            steps[i]()
            if turn >= warm_up:
                seconds[i].append(time.perf_counter() - started)
    return seconds


def stepper(model: Any, variant: Variant | None, request: Request) -> tuple[Step, MemoryMeter]:
    """A prompt read, ready to decode token by token, and the meter that watched the prefill; None: plain."""
    if variant is None:
        memory = MemoryMeter(model.device)
        return plain_steps(model, request.ids, memory), memory
    engine = Engine(model, 1)
    return lane_steps(engine, Job(request, [variant])), engine.memory


def peaks(model: Any, variant: Variant | None, request: Request, tokens: int) -> dict[str, int]:
    """On CUDA, the most memory that was allocated while one prompt was read, and while it was continued."""
    if model.device.type != "cuda":
        return {}
    step, memory = stepper(model, variant, request)
    memory.start()
    for _ in range(tokens):
        step()
    memory.stop("decode")
    return {f"peak_{phase}_bytes": peak for phase, peak in memory.peaks.items()}


def decode_rows(
    model: Any, variant: Variant | None, requests: Sequence[Request], tokens: int, repeats: int, name: str
) -> list[dict[str, Any]]:
    """One row per prompt; the ratio is the median, over tokens, of the first prompt's time to this one's.

    Args:
        variant: policy and budget; None: plain transformers.
        tokens: generated per turn, `SPARE` fewer than the requests allow at least.
        repeats: turns, each from new prefills.
        name: shown while it runs.
    """
    memory = [peaks(model, variant, request, tokens) for request in requests]
    seconds: list[list[float]] = [[] for _ in requests]
    for turn in range(repeats):
        taken = in_turn([stepper(model, variant, request)[0] for request in requests], tokens)
        for found, more in zip(seconds, taken, strict=True):
            found += more
        medians = ", ".join(f"{statistics.median(more):.4f}" for more in taken)
        print(f"  {visible(name)}: {medians} s per token (turn {turn + 1} of {repeats})", file=sys.stderr, flush=True)
    return [
        {
            "prompt_tokens": len(request.ids),
            "tokens_per_second": 1 / statistics.median(taken),
            "ratio_to_shortest": statistics.median(a / b for a, b in zip(seconds[0], taken, strict=True)),
            "tokens": len(taken),
            **peak,
        }
        for request, taken, peak in zip(requests, seconds, memory, strict=True)
    ]
