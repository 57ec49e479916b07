"""Runs kvpress cells in its own environment: one JSON request per line on stdin, one answer per line on stdout.

Started by `src.bench` (parts `peers`, `overlap`) with the interpreter of `make bench-peers`; imports nothing of this
project. kvpress is used as its documentation says: a press around the prefill, then greedy decoding from the cut cache.
A request with `presses` asks which positions each of them keeps instead.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    KnormPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

PRESSES = {
    "full": lambda ratio: None,
    "streaming_llm": lambda ratio: StreamingLLMPress(compression_ratio=ratio, n_sink=4),
    "snapkv": lambda ratio: SnapKVPress(compression_ratio=ratio, window_size=32, kernel_size=7),
    "observed": lambda ratio: ObservedAttentionPress(compression_ratio=ratio),  # its H2O; needs eager attention
}
KINDS = {
    "streaming_llm": StreamingLLMPress,
    "snapkv": SnapKVPress,
    "observed": ObservedAttentionPress,
    "tova": TOVAPress,
    "pyramidkv": PyramidKVPress,
    "knorm": KnormPress,
}


@torch.inference_mode()
def cell(model: torch.nn.Module, ids: list[int], press: str, budget: int | None, new_tokens: int) -> list[int]:
    """Prefill under a press, then `new_tokens` greedy tokens."""
    tokens, cache = torch.tensor([ids]), DynamicCache()
    ratio = 0.0 if budget is None else max(0.0, 1 - budget / len(ids))
    made = PRESSES[press](ratio)
    if made is None:
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    else:
        with made(model):
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    generated = [int(logits[0, -1].argmax())]
    for position in range(len(ids), len(ids) + new_tokens - 1):
        where = torch.tensor([[position]])
        logits = model(torch.tensor([generated[-1:]]), past_key_values=cache, position_ids=where).logits
        generated.append(int(logits[0, -1].argmax()))
    return generated


def press_of(name: str, settings: dict[str, Any], budget: int, length: int) -> Any:
    """A press that keeps `budget` of `length` tokens in every head, on average; `adakv` goes with SnapKV's scores."""
    ratio = 1 - budget / length
    while int(length * (1 - ratio)) < budget:  # its own rounding down must not lose one
        ratio = math.nextafter(ratio, 0)
    if name == "adakv":
        own = {key: value for key, value in settings.items() if key != "alpha_safeguard"}
        return AdaKVPress(SnapKVPress(compression_ratio=ratio, **own), alpha_safeguard=settings["alpha_safeguard"])
    return KINDS[name](compression_ratio=ratio, **settings)


@torch.inference_mode()
def kept(model: torch.nn.Module, ids: list[int], presses: list[Any]) -> list[list[list[list[int]]]]:
    """Positions that each press keeps, press -> layer -> KV head -> ascending; one prefill for all of them."""
    found: list[list[list[list[int]]]] = [[] for _ in presses]
    with ExitStack() as stack:
        for press, layers in zip(presses, found, strict=True):
            press.compress = watched(press.compress, layers)
            stack.enter_context(press(model))
        model(torch.tensor([ids]), past_key_values=DynamicCache(), logits_to_keep=1)
    return found


def watched(compress: Callable[..., Any], layers: list[list[list[int]]]) -> Callable[..., Any]:
    """A press' `compress` that cuts nothing and writes down, layer after layer, what it would keep.

    A cut cache does not say its positions. So the press is given values that are their positions' numbers (none of
    `KINDS` reads values): what it leaves of them is what it keeps. A press by head leaves everything and masks.
    """

    def watch(module: Any, hidden: Any, keys: torch.Tensor, values: torch.Tensor, *rest: Any) -> Any:
        numbers = torch.arange(keys.shape[2], dtype=torch.float32)[None, None, :, None].expand(values.shape)
        left = compress(module, hidden, keys, numbers, *rest)[1][0, :, :, 0].long()
        heads = [set(head) for head in left.tolist()]
        masked = getattr(module, "masked_key_indices", None)
        if masked is not None:
            for head, position in zip(masked[1].tolist(), masked[2].tolist(), strict=True):
                heads[head].discard(position)
            module.masked_key_indices = None
        layers.append([sorted(head) for head in heads])
        return keys, values

    return watch


def kept_by_all(models: dict[str, torch.nn.Module], ids: list[int], asked: list[dict[str, Any]]) -> list[Any]:
    """The answers in the order asked, each from the attention that its press needs."""
    answers: list[Any] = [None] * len(asked)
    for kind, model in models.items():
        mine = [i for i, one in enumerate(asked) if attention(one["press"]) == kind]
        presses = [press_of(asked[i]["press"], asked[i]["settings"], asked[i]["budget"], len(ids)) for i in mine]
        for i, answer in zip(mine, kept(model, ids, presses) if mine else [], strict=True):
            answers[i] = answer
    return answers


def attention(press: str) -> str:
    """Eager only where the press needs the weights."""
    return "eager" if press == "observed" else "sdpa"


def main(path: str) -> None:
    transformers_logging.disable_progress_bar()
    models = {
        kind: AutoModelForCausalLM.from_pretrained(path, attn_implementation=kind, dtype=torch.float32).eval()
        for kind in ("sdpa", "eager")
    }
    print(json.dumps({"ready": True, "version": version("kvpress")}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "presses" in request:
            print(json.dumps({"kept": kept_by_all(models, request["ids"], request["presses"])}), flush=True)
            continue
        model = models[attention(request["press"])]
        started = time.perf_counter()
        tokens = cell(model, request["ids"], request["press"], request["budget"], request["new_tokens"])
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
