"""Fidelity measures against a hand computation: full forward passes, and the naive implementation."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.ahakv import AhaKV
from policies.base import Policy
from policies.full import Full
from policies.h2o import H2O
from policies.snapkv import SnapKV
from policies.streaming_llm import StreamingLLM
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from tests.support import naive
from tests.support.cli import call, lines
from tests.support.naive import Naive
from tests.support.tiny import tiny, tiny_tokenizer, tokens

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

FULL = Variant(Full(), None)
BUDGETED = [Variant(p, 14) for p in (StreamingLLM(), H2O(), SnapKV(window=6), AhaKV(window=6))]
NEW = 7


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", torch.float64)


def ask(n: int, answer: int, seed: int = 0, **more: Any) -> Request:
    ids = tokens(n, seed=seed)[0].tolist()
    return Request(f"{n}", ids, frozenset(), NEW, reference=tokens(answer, seed=100 + seed)[0].tolist(), **more)


def run(model: Any, requests: list[Request], variants: list[Variant]) -> dict[tuple[str, Variant], Generation]:
    found = {}
    for generation in Engine(model, 1000).run([Job(request, variants) for request in requests]):
        assert (generation.request.name, generation.variant) not in found
        found[generation.request.name, generation.variant] = generation
    assert len(found) == len(requests) * len(variants)
    return found


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum().log()


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def by_hand(model: Any, generation: Generation, policy: Policy, budget: int) -> dict[str, Any]:
    """Read the reference through the naive cache and through the naive full cache, and compare."""
    request = generation.request

    def ties(step: int, layer: int, head: int) -> set[int]:
        """Max-pooling gives neighbours equal scores; see `naive`."""
        return set(generation.kept_prompt[layer][head].tolist())

    reference = request.reference
    assert reference is not None
    lane, full = (
        Naive(model, p, b, ties).run(request.ids, 1, request.context_tokens, feed=reference[:-1])
        for p, b in ((policy, budget), (Full(), len(request.ids)))
    )
    steps = [s for s in range(len(lane.logits))][-len(reference) :]  # logits[s] predict reference token number s
    own = [log_softmax(lane.logits[s]) for s in steps]
    truth = [log_softmax(full.logits[s]) for s in steps]
    decoded = [i for i, s in enumerate(steps) if s > 0]  # the prompt's own last token saw the whole prompt
    return {
        "nll": mean([-float(own[i][token]) for i, token in enumerate(reference)]),
        "kl": mean([float((truth[i].exp() * (truth[i] - own[i])).sum()) for i in decoded]),
        "top1": mean([float(truth[i].argmax() == own[i].argmax()) for i in decoded]),
        "tokens": len(reference),
        "output_error": [
            mean(
                [
                    float((lane.outputs[s][layer] - full.outputs[s][layer]).norm() / full.outputs[s][layer].norm())
                    for s in steps
                    if s > 0
                ]
            )
            for layer in range(2)
        ],
    }


def same(found: Any, expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


REQUESTS = [
    ask(40, 9, seed=1),
    ask(25, 4, seed=2),
    ask(10, 12, seed=3),
    ask(36, 6, seed=4, context_tokens=30),
    ask(31, 5, seed=5, context_tokens=30),
]


@pytest.fixture(scope="module")
def wave(model: Any) -> dict[tuple[str, Variant], Generation]:
    return run(model, REQUESTS, [FULL, *BUDGETED])


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.name)
def test_nll_of_the_full_cache_is_the_plain_models(model: Any, wave: Any, request_: Request) -> None:
    model.set_attn_implementation("sdpa")
    text, reference = torch.tensor([request_.ids + request_.reference]), request_.reference
    logits = model(text, use_cache=False).logits[0, len(request_.ids) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(reference))
    expected = {"nll": float(nll), "kl": 0.0, "top1": 1.0, "tokens": len(reference), "output_error": [0.0, 0.0]}
    same(wave[request_.name, FULL].fidelity, expected)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.name)
@pytest.mark.parametrize("variant", BUDGETED, ids=lambda v: type(v.policy).__name__)
def test_a_policy_against_the_naive_one(model: Any, wave: Any, request_: Request, variant: Variant) -> None:
    generation = wave[request_.name, variant]
    found = generation.fidelity
    same(found, by_hand(model, generation, variant.policy, 14))
    if len(request_.ids) > 14:
        assert found["kl"] > 1e-4 and max(found["output_error"]) > 1e-3  # else this would prove nothing


def test_measuring_changes_nothing(model: Any, wave: Any) -> None:
    for request in REQUESTS:
        silent = Request(request.name, request.ids, frozenset(), NEW, context_tokens=request.context_tokens)
        for (_, variant), generation in run(model, [silent], [FULL, *BUDGETED]).items():
            measured = wave[request.name, variant]
            assert generation.fidelity is None
            assert generation.tokens == measured.tokens
            assert [k.tolist() for k in generation.kept_end] == [k.tolist() for k in measured.kept_end]
            assert generation.kv_bytes_peak == measured.kv_bytes_peak


def test_without_the_full_cache_among_the_variants(model: Any, wave: Any) -> None:
    """It runs beside the others, to be compared with, and is not handed out."""
    for key, generation in run(model, REQUESTS[:3], BUDGETED).items():
        same(generation.fidelity, wave[key].fidelity)


@pytest.mark.parametrize("variants", [[FULL], BUDGETED], ids=["full", "budgeted"])
def test_a_reference_of_one_token(model: Any, variants: list[Variant]) -> None:
    """Predicted by the prompt itself: nothing was read through the cut cache."""
    request = ask(40, 1)
    model.set_attn_implementation("sdpa")
    expected = model(torch.tensor([request.ids])).logits[0, -1].log_softmax(-1)[request.reference[0]]
    for generation in run(model, [request], variants).values():
        same(
            generation.fidelity,
            {"nll": -float(expected), "kl": 0.0, "top1": 1.0, "tokens": 1, "output_error": [0.0, 0.0]},
        )


def test_forbidden_stop_tokens_count_for_generation_only(model: Any) -> None:
    """`min_new_tokens` forbids the stop token at first; the likelihood of the reference is the model's all the same."""
    plain = ask(30, 5)
    stop = frozenset({plain.reference[0], plain.reference[2]})
    held = Request("held", plain.ids, stop, NEW, min_new_tokens=3, reference=plain.reference)
    for variant in (FULL, BUDGETED[1]):
        (a,) = run(model, [plain], [variant]).values()
        (b,) = run(model, [held], [variant]).values()
        same(a.fidelity, b.fidelity)


def test_a_tokenizer_without_an_end_token(model_folder: Path, base: list[str], tmp_path: Path) -> None:
    """The reference then simply has no end token: one number per character of the answer."""
    folder = tmp_path / "no-end"
    shutil.copytree(model_folder, folder)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    done = call("run", *base, f"model.path={folder}", "policy=h2o", "budget=40", "fidelity=true")
    assert done.code == 0, done.err
    assert [r["fidelity"]["tokens"] for r in lines(done.folder)] == [len(r["answers"][0]) for r in lines(done.folder)]
