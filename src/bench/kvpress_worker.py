"""Runs kvpress cells in its own environment: one JSON request per line on stdin, one answer per line on stdout.

Started by `src.bench` (part `peers`) with the interpreter of `make bench-peers`; imports nothing of this project.
kvpress is used as its documentation says: a press around the prefill, then greedy decoding from the cut cache.
"""

import json
import sys
import time

import torch
from kvpress import ObservedAttentionPress, SnapKVPress, StreamingLLMPress
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

PRESSES = {
    "full": lambda ratio: None,
    "streaming_llm": lambda ratio: StreamingLLMPress(compression_ratio=ratio, n_sink=4),
    "snapkv": lambda ratio: SnapKVPress(compression_ratio=ratio, window_size=32, kernel_size=7),
    "observed": lambda ratio: ObservedAttentionPress(compression_ratio=ratio),  # its H2O; needs eager attention
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


def main(path: str) -> None:
    transformers_logging.disable_progress_bar()
    # The request's own attention: eager only where the press needs the weights.
    models = {
        kind: AutoModelForCausalLM.from_pretrained(path, attn_implementation=kind, dtype=torch.float32).eval()
        for kind in ("sdpa", "eager")
    }
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        model = models["eager" if request["press"] == "observed" else "sdpa"]
        started = time.perf_counter()
        tokens = cell(model, request["ids"], request["press"], request["budget"], request["new_tokens"])
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
