"""Policies with parts beside loops over the full attention: what is kept after the prompt and at every step, what is
said, and the logits."""

from typing import Any

import pytest
import torch

from policies.adakv import AdaKV
from policies.ahakv import AhaKV
from policies.base import Policy
from policies.cake import CAKE, Cascade
from policies.duo_attention import RetrievalHeads
from policies.h2o import H2O
from policies.kivi import KIVI
from policies.pyramidkv import Pyramid
from policies.snapkv import SnapKV
from policies.streaming_llm import StreamingLLM
from policies.think import ThinK
from policies.tova import TOVA
from src.engine.engine import Engine
from src.engine.probes import LaneView, Probe
from src.engine.request import Generation, Job, Request, Variant
from tests.support import naive
from tests.support.naive import Kept
from tests.support.naive_parts import NaiveParts
from tests.support.tiny import tiny, tokens
from tests.support.watch import logits_of

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

STEPS, BUDGET = 30, 24
CELLS: dict[str, Policy] = {
    "snapkv pyramid": SnapKV(window=8, allocate=Pyramid(5)),
    "snapkv adakv": SnapKV(window=8, allocate=AdaKV()),
    "snapkv ada_pyramid": SnapKV(window=8, allocate=AdaKV(base=Pyramid(5))),
    "cake cascade": CAKE(window=8, allocate=Cascade(window=8)),
    "streaming retrieval": StreamingLLM(positions="original", allocate=RetrievalHeads(sinks=4, recent=8, window=8)),
    "h2o adakv": H2O(allocate=AdaKV()),
    "h2o pyramid": H2O(allocate=Pyramid(3)),
    "h2o cascade": H2O(allocate=Cascade(window=8)),
    "ahakv adakv": AhaKV(window=8, allocate=AdaKV()),
    "ahakv cached adakv": AhaKV(window=8, gain_position="cached", gain_guard="literal", allocate=AdaKV()),
    "think": SnapKV(window=8, store=ThinK(recent=4, rows=16)),
    "think cascade": CAKE(window=8, allocate=Cascade(window=8), store=ThinK(recent=4, rows=16)),
    "kivi": SnapKV(window=8, store=KIVI(8, 8, 8)),
    "kivi adakv": SnapKV(window=8, allocate=AdaKV(), store=KIVI(8, 8, 16)),
}


class Heads(Probe):
    """What every head holds after the cut and after each step."""

    def __init__(self) -> None:
        self.kept: dict[Generation, list[Kept]] = {}

    def on_cut(self, generation: Generation) -> None:
        kept = [[[p for p in head if p >= 0] for head in layer.tolist()] for layer in generation.kept_prompt]
        self.kept[generation] = [kept]

    def on_step(self, lane: LaneView) -> None:
        self.kept[lane.generation].append(
            [[sorted(head.tolist()) for head in cache.kept(lane.row)] for cache in lane.caches]
        )


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", torch.float64, num_hidden_layers=3)


def run(model: Any, ids: list[list[int]], variants: list[Variant]) -> list[tuple[Generation, list[Kept]]]:
    probe = Heads()
    jobs = [Job(Request(str(i), one, frozenset(), STEPS + 1), variants) for i, one in enumerate(ids)]
    done = list(Engine(model, 1000, [probe]).run(jobs))
    assert not [g.error for g in done if g.error]
    return [(g, probe.kept[g]) for g in done]


@pytest.mark.parametrize("length", [63, 30, 15])
@pytest.mark.parametrize("name", CELLS)
def test_as_the_loops(model: Any, name: str, length: int) -> None:
    policy, ids = CELLS[name], tokens(length, seed=length)[0].tolist()
    found: list[tuple[Generation, list[Kept]]] = []
    logits = logits_of(model, lambda: found.extend(run(model, [ids], [Variant(policy, BUDGET)])))
    ((got, history),) = found
    loops = NaiveParts(model, policy, BUDGET, lambda step, layer, head: set(history[step][layer][head]))
    expected = loops.run(ids, STEPS + 1)
    for step, (mine, theirs) in enumerate(zip(history, expected.kept, strict=True)):
        assert mine == theirs, f"kept positions differ after step {step}"
    assert got.tokens == expected.tokens
    close = 1e-5 if "kivi" in name else 1e-8  # the step of a group of one number may be the smallest that float16 has
    for mine_, theirs_ in zip(logits, expected.logits, strict=True):
        assert torch.allclose(mine_[0], theirs_, atol=close)


def test_heads_differ(model: Any) -> None:
    """Or the loops above would prove little."""
    ids = tokens(63, seed=63)[0].tolist()
    for name, policy in CELLS.items():
        ((got, _),) = run(model, [ids], [Variant(policy, BUDGET)])
        counts = [[int((head >= 0).sum()) for head in layer] for layer in got.kept_prompt]
        assert sum(map(sum, counts)) == BUDGET * 6
        if "adakv" in name or "ada_" in name or "retrieval" in name:
            assert any(len(set(layer)) > 1 for layer in counts), counts
        elif policy.allocate:
            assert len({layer[0] for layer in counts}) > 1


@pytest.mark.parametrize("policy", [H2O, TOVA, lambda **part: AhaKV(window=8, **part)], ids=["h2o", "tova", "ahakv"])
def test_prompts_shorter_than_the_budget_have_it_all_beside_a_store(model: Any, policy: Any) -> None:
    """A store that drops nothing is the exact cache: while there is room, when there is none, for lanes of differing
    lengths in one batch."""
    ids = [tokens(n, seed=n)[0].tolist() for n in (15, 11, 20, 24, 40)]
    plain = run(model, ids, [Variant(policy(), BUDGET)])
    held = run(model, ids, [Variant(policy(store=ThinK(ratio=0)), BUDGET)])
    for (one, history), (other, kept) in zip(plain, held, strict=True):
        assert one.tokens == other.tokens and history == kept
        channels = 3 * 2 * 16 * 2  # numbers of the channels that stay: layers, heads, channels, bytes
        assert one.kv_bytes == other.kv_bytes - channels and one.kv_bytes_peak == other.kv_bytes_peak - channels
    at_once = run(model, ids[:1], [Variant(policy(store=KIVI(8, 8, 8)), BUDGET)])
    assert [len(head) for head in at_once[0][1][-1][0]] == [BUDGET] * 2
