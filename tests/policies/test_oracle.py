"""The engine and its policies against `naive.py`: the same kept positions after every step, the same tokens.

All cells of a model run in one wave, mixed with each other and with prompts of other lengths, and each must give
what the naive implementation gives for it alone. In float64, so that rounding decides nothing.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from policies.ahakv import AhaKV
from policies.base import Policy
from policies.full import Full
from policies.h2o import H2O
from policies.snapkv import SnapKV
from policies.streaming_llm import StreamingLLM
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from tests.support import naive
from tests.support.naive import Kept, Naive
from tests.support.tiny import SUPPORTED, tiny, tokens
from tests.support.watch import Watch, sort

STEPS = 30


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(length, seed=seed)[0].tolist()


def run(model: Any, requests: Sequence[Request], variants: Sequence[Variant]) -> dict[tuple[str, int], tuple]:
    """Everything in one wave: (request's name, index of the variant) -> (generation, kept after every step)."""
    watch, results = Watch(), {}
    for generation in Engine(model, 1000, [watch]).run([Job(request, variants) for request in requests]):
        results[generation.request.name, variants.index(generation.variant)] = (generation, watch.kept[generation])
    return results


def check(model: Any, got: tuple[Generation, list[Kept]]) -> None:
    """The naive implementation of this cell, alone, does the same."""
    generation, history = got
    request, variant = generation.request, generation.variant
    scope = request.context_tokens or len(request.ids)
    budget = variant.cell(scope).budget
    alone = Naive(model, variant.policy, budget, lambda step, layer, head: set(history[step][layer][head]))
    expected = alone.run(request.ids, request.max_new_tokens, request.context_tokens)
    assert len(history) == len(expected.kept)
    for step, (mine, theirs) in enumerate(zip(history, expected.kept, strict=True)):
        assert mine == theirs, f"kept positions differ after step {step}"
    assert generation.tokens == expected.tokens
    assert [sort(layer) for layer in generation.kept_end] == expected.kept[-1]


BASE: list[tuple[Policy, int | float | None]] = [
    (Full(), None),
    (StreamingLLM(), 16),
    (StreamingLLM(), 41),
    (StreamingLLM(positions="original"), 16),
    (StreamingLLM(sinks=0), 20),
    (StreamingLLM(sinks=1), 2),
    (H2O(), 2),
    (H2O(), 17),
    (H2O(), 41),
    (H2O(heavy_share=0.2), 20),
    (H2O(heavy_share=1.0), 20),
    (H2O(), 0.5),
    (SnapKV(), 41),
    (SnapKV(window=8), 17),
    (SnapKV(window=8, kernel=1), 17),
    (SnapKV(window=8, kernel=5, pooling="avg"), 17),
    (SnapKV(window=8, group="max"), 17),
    (AhaKV(), 41),
    (AhaKV(), 34),
    (AhaKV(window=8), 17),
]

# One AhaKV switch at a time, with a window that leaves room to choose.
SWITCHES: list[dict[str, Any]] = [
    {"recent_accumulation": False},
    {"step_gain": False},
    {"value_prior": False},
    {"recent_accumulation": False, "step_gain": False, "value_prior": False},
    {"recent_accumulation": False, "gain_guard": "skip"},
    {"gain_position": "cached"},
    {"gain_position": "cached", "gain_guard": "literal"},
    {"gain_position": "frozen"},
    {"gain_budget": "history"},
    {"gain_guard": "literal"},
    {"gain_guard": "skip"},
    {"decode_score": "running"},
    {"decode_score": "decay", "decay": 0.8},
    {"decode_score": "decay", "recent_accumulation": False},
    {"logit_variance": "measured"},
    {"logit_variance": "measured", "recent_accumulation": False},
    {"logit_variance": "entropy"},
    {"group": "max"},
    {"group": "max", "decode_score": "running", "recent_accumulation": False},
    {"value_norm": "l2"},
    {"value_norm": "l1", "value_pool": 7},
    {"value_pool": 1},
    {"score_pool": 7},
    {"score_pool": 3, "value_prior": False, "group": "max"},
    {"sinks": 4},
    {"sinks": 2, "score_pool": 5, "value_prior": False},
]
CELLS = [Variant(p, b) for p, b in BASE] + [Variant(AhaKV(window=8, **s), 20) for s in SWITCHES]
LENGTHS = {"long": 63, "between": 29, "short": 11}


def describe(variant: Variant) -> str:
    changed = {k: v for k, v in vars(variant.policy).items() if v != getattr(type(variant.policy), k)}
    return f"{type(variant.policy).__name__}-{variant.budget}-{changed}"


one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", torch.float64)


@pytest.fixture(scope="module")
def wave(llama: Any) -> dict[tuple[str, int], tuple]:
    """Every cell with three prompts, all lanes in one batch."""
    requests = [Request(name, prompt(n, seed=n), frozenset(), STEPS + 1) for name, n in LENGTHS.items()]
    return run(llama, requests, CELLS)


CASES = [(cell, length) for cell in range(len(CELLS)) for length in LENGTHS if cell < len(BASE) or length != "short"]


@pytest.mark.parametrize(("cell", "length"), CASES, ids=lambda x: describe(CELLS[x]) if isinstance(x, int) else x)
def test_llama(llama: Any, wave: dict[tuple[str, int], tuple], cell: int, length: str) -> None:
    check(llama, wave[length, cell])


FEW = [
    Variant(StreamingLLM(), 14),
    Variant(H2O(), 14),
    Variant(SnapKV(window=6), 14),
    Variant(AhaKV(window=6), 14),
]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{arch: (arch, {}) for arch in SUPPORTED if arch != "llama"},
    "one KV head": ("llama", {"num_key_value_heads": 1}),
    "no groups": ("llama", {"num_key_value_heads": 4}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_other_architectures(shape: str) -> None:
    arch, overrides = SHAPES[shape]
    model = tiny(arch, torch.float64, **overrides)
    results = run(model, [Request("x", prompt(30), frozenset(), 13)], FEW)
    assert len(results) == len(FEW)
    for got in results.values():
        check(model, got)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 13, 14, 15])
def test_prompts_about_as_short_as_what_is_always_kept(llama: Any, length: int) -> None:
    variants = [Variant(StreamingLLM(), 14), Variant(H2O(), 14), Variant(AhaKV(window=6, gain_guard="literal"), 14)]
    for got in run(llama, [Request("x", prompt(length), frozenset(), 19)], variants).values():
        check(llama, got)


def test_the_question_is_read_through_the_cut_cache(llama: Any) -> None:
    """`prompt_scope=context`: the policy sees the context only, then the question is fed token by token."""
    variants = [Variant(Full(), None), Variant(AhaKV(window=6), 0.5), *FEW]
    requests = [
        Request("long question", prompt(40, seed=1), frozenset(), 6, context_tokens=26),
        Request("one token", prompt(36, seed=2), frozenset(), 6, context_tokens=35),
        Request("short context", prompt(30, seed=3), frozenset(), 6, context_tokens=4),
    ]
    results = run(llama, requests, variants)
    assert len(results) == len(requests) * len(variants)
    for got in results.values():
        check(llama, got)


def test_together_is_as_alone(llama: Any, wave: dict[tuple[str, int], tuple]) -> None:
    """Also directly: a cell in a wave of over a hundred lanes, and alone in an engine of its own."""
    for cell in range(0, len(CELLS), 8):
        together, together_history = wave["long", cell]
        ((alone, history),) = run(llama, [together.request], [CELLS[cell]]).values()
        assert alone.tokens == together.tokens
        assert history == together_history
        assert (alone.kv_bytes, alone.kv_bytes_peak) == (together.kv_bytes, together.kv_bytes_peak)


def test_a_cell_does_not_depend_on_its_neighbours_settings(llama: Any) -> None:
    """What one variant works out about the prompt must not be mistaken for another's."""
    variants = [
        Variant(AhaKV(window=window, logit_variance=kind, recent_accumulation=recent), 24)
        for kind in ("measured", "entropy")
        for recent in (True, False)
        for window in (4, 16)
    ]
    request = Request("x", prompt(60), frozenset(), 3)
    together = run(llama, [request], variants)
    for i, variant in enumerate(variants):
        assert run(llama, [request], [variant])["x", 0][1] == together["x", i][1], describe(variant)
