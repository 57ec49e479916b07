"""What the coming answer will attend to in the prompt: found with the full cache, before the prompt is cut.

Only for policies that say so (`Policy.foresees`): upper bounds, not methods. The answer's tokens are known (read
off a first greedy run, or the reference), so one causal forward pass over prompt and answer shows all their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.engine.attention import Attention, forward
from src.engine.request import Job, Request
from src.errors import InputError
from src.kv.prompt import PromptAttention


def foresee(
    job: Job, scope: int, model: PreTrainedModel, generate: Callable[[Request], list[int]]
) -> list[dict[str, Tensor]]:
    """Per layer and kind of answer, the attention that the first `scope` tokens receive from all later ones.

    Args:
        generate: gives the full cache's greedy answer to a request without a reference.

    Returns:
        Tensors `(kv_heads, group, scope)`; an empty list when no variant looks ahead.

    Raises:
        InputError: a policy looks at the reference answer and there is none.
    """
    kinds = {variant.policy.foresees: type(variant.policy).__name__ for variant in job.variants}
    found: dict[str, list[Tensor]] = {}
    for kind, name in kinds.items():
        if kind is None:
            continue
        answer = job.request.reference if kind == "reference" else generate(replace(job.request, reference=None))
        if not answer:
            raise InputError(
                f"policy {name}, answer=reference: sample {job.request.name} comes without a reference answer; "
                "valid: fidelity=true, or answer=generated"
            )
        watch = AnswerPass(scope, len(job.request.ids) + len(answer) - 1)
        ids = torch.tensor([[*job.request.ids, *answer[:-1]]], device=model.device)  # the last one is never read
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        forward(model, ids, positions, watch, logits_to_keep=1)
        found[kind] = watch.received
    return [dict(zip(found, layer, strict=True)) for layer in zip(*found.values(), strict=True)]


class AnswerPass:
    """A forward pass over prompt and answer that notes, layer by layer, what the answer attends to.

    Attributes:
        received: per layer, attention that each prompt token got from the later rows, `(kv_heads, group, scope)`.
            An answer of one token has no row of its own; then it is the row that predicted it.
    """

    def __init__(self, scope: int, length: int) -> None:
        self.scope, self.longest = scope, length
        self.received: list[Tensor] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """`(1, heads, n, head_dim)` in, `(1, n, heads, head_dim)` out."""
        text = PromptAttention(query[0], key[0], value[0], scaling, layer, layer + 1)
        first_row = min(self.scope, text.length - 1)
        self.received.append(text.column_sums(first_row=first_row)[..., : self.scope])
        return attention(query, key, value)
