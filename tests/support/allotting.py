"""Drives an allocator as an engine would, layer by layer, and holds it to what `src.kv.plan.Plan` says."""

from collections.abc import Sequence

import torch
from torch import Tensor

from policies.parts import Allocator
from src.kv.plan import Allotment
from src.kv.prompt import PromptAttention

DIM = 8


def prompt(
    n: int, kv_heads: int = 2, group: int = 2, layer: int = 0, layers: int = 1, seed: int = 0
) -> PromptAttention:
    """Random, float64; the layers differ in how peaked their attention is."""
    draw = torch.Generator().manual_seed(1000 * seed + layer)
    heads = (kv_heads * group, kv_heads, kv_heads)
    q, k, v = (torch.randn(h, n, DIM, generator=draw, dtype=torch.float64) for h in heads)
    sharpness = 0.5 + 3 * torch.rand(kv_heads * group, 1, 1, generator=draw, dtype=torch.float64)
    return PromptAttention(q * sharpness, k, v, DIM**-0.5, layer, layers)


def prompts(a: Allotment, seed: int = 0, group: int = 2) -> list[PromptAttention]:
    return [prompt(a.length, a.kv_heads, group, layer, a.layers, seed) for layer in range(a.layers)]


def random_scores(a: Allotment, seed: int = 0) -> list[Tensor]:
    """`(kv_heads, n)` for every layer, the last `always` tokens stay; heads differ in how large theirs are."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(a.layers):
        scores = torch.rand(a.kv_heads, a.length, generator=draw) * torch.rand(a.kv_heads, 1, generator=draw)
        scores[:, a.length - a.always :] = torch.inf
        found.append(scores)
    return found


def counts_of(
    allocator: Allocator, a: Allotment, scores: Sequence[Tensor] = (), seen: Sequence[PromptAttention] = ()
) -> list[list[int]]:
    """The counts after the last layer, `[layer][KV head]`; what must hold at every layer is asserted."""
    plan, held = allocator.plan(a), dict[int, list[int]]()
    scores, seen = scores or random_scores(a), seen or prompts(a)
    for layer, (attention, worth) in enumerate(zip(seen, scores, strict=True)):
        assert 1 <= plan.told(layer) <= a.length or a.budget >= a.length
        answer = plan.cut(attention, worth)
        assert layer in answer
        for at, counts in answer.items():
            assert at <= layer and len(counts) == a.kv_heads and all(type(count) is int for count in counts)
            assert all(min(a.always + 1, a.length) <= count <= a.length for count in counts)
            if at in held and at < layer:
                assert list(counts) != held[at], "only what shrinks is said again"
                assert all(now <= then for now, then in zip(counts, held[at], strict=True)), "what is gone is gone"
            held[at] = list(counts)
        if allocator.exact:
            assert sum(map(sum, held.values())) <= a.total
    assert sorted(held) == list(range(a.layers))
    if allocator.exact:
        assert sum(map(sum, held.values())) == a.total
    return [held[layer] for layer in range(a.layers)]
