"""Probes: which lanes they are shown and what they see, and who holds a prompt's caches when."""

from typing import Any

import pytest
import torch

from policies.full import Full
from policies.h2o import H2O
from policies.hcattention import HCAttention
from policies.oracle import Oracle
from policies.snapkv import SnapKV
from src.engine.engine import Engine
from src.engine.probes import LaneView, Probe
from src.engine.request import Generation, Job, Request, Variant
from src.session.trace_probe import TraceProbe
from tests.support import naive
from tests.support.hungry import HungryLater
from tests.support.tiny import tiny, tokens
from tests.support.watch import Watch, logits_of, sort

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

NEW = 9


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def ask(name: str, length: int = 30, **more: Any) -> Request:
    return Request(name, tokens(length, seed=int(name))[0].tolist(), frozenset(), NEW, **more)


def test_lanes_that_answer_are_shown_and_no_others(model: Any) -> None:
    """Neither those that read the reference, nor the full cache that it or an oracle needs."""
    variants = [Variant(H2O(), 12), Variant(SnapKV(window=4), 12), Variant(Oracle(), 12)]
    requests = [ask("0", reference=tokens(5, seed=9)[0].tolist()), ask("1", 20, context_tokens=14)]
    watch = Watch()
    results = list(Engine(model, 100, [watch]).run([Job(request, variants) for request in requests]))
    assert len(results) == 6 and set(watch.kept) == set(results)
    for result in results:
        history = watch.kept[result]
        assert len(history) == 1 + result.decode_steps
        assert history[0] == [sort(layer) for layer in result.kept_prompt]
        assert history[-1] == [sort(layer) for layer in result.kept_end]


def test_what_a_lane_shows(model: Any) -> None:
    chooser = HCAttention(quantise_keys=False, tau=0.5, offload_values=False)
    variants = [Variant(Full(), None), Variant(chooser, None)]
    seen: dict[Variant, list[tuple[int, int]]] = {variant: [] for variant in variants}

    def look(lane: LaneView) -> None:
        shares = lane.attended()
        assert (shares is not None) == (lane.generation.variant.policy.reader is not None)
        assert len(lane.kept) == 2 and all(layer.shape == (2, 30 + lane.t) for layer in lane.kept)
        if shares is not None:
            assert [share.shape for share in shares] == [layer.shape for layer in lane.kept]
            assert all(share.max() <= 1 and (share > 0).any() and (share == 0).any() for share in shares)
        seen[lane.generation.variant].append((lane.t, len(lane.generation.tokens)))

    list(Engine(model, 100, [Watch(look)]).run([Job(ask("0"), variants)]))
    assert list(seen.values()) == [[(t, t + 1) for t in range(1, NEW)]] * 2


def test_watching_changes_nothing_and_several_may_watch(model: Any) -> None:
    jobs = [Job(ask("0"), [Variant(H2O(), 12)]), Job(ask("1", 20), [Variant(SnapKV(window=4), 12)])]
    first, second = Watch(), Watch()
    plain = logits_of(model, lambda: list(Engine(model, 100).run(jobs)))
    seen = logits_of(model, lambda: list(Engine(model, 100, [first, second]).run(jobs)))
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert first.kept == second.kept and first.steps == 2 * (NEW - 1)


def test_a_lane_that_begins_again_is_cut_again_and_its_trace_starts_afresh(model: Any) -> None:
    class Cuts(Probe):
        def __init__(self) -> None:
            self.names: list[str] = []

        def on_cut(self, generation: Generation) -> None:
            self.names.append(generation.request.name)

    cuts, probe = Cuts(), TraceProbe(every=1)
    jobs = [Job(ask(str(i)), [Variant(HungryLater(), 12)]) for i in range(2)]
    results = list(Engine(model, 2, [cuts, probe]).run(jobs))
    assert cuts.names == ["0", "1", "0", "1"] and not any(g.error for g in results)
    for result in results:
        trace = probe.take(result)
        assert trace is not None and trace.steps == list(range(NEW))
    assert not probe.traces


def test_a_wave_takes_over_what_its_forks_hold(model: Any) -> None:
    """So that nothing of a prompt is held twice, whoever still knows the fork."""
    engine = Engine(model)
    with torch.inference_mode():
        lanes = engine.prefill(Job(ask("0", reference=[3, 4]), [Variant(H2O(), 12), Variant(Full(), None)]))
    forks = {lane.fork for lane in lanes}
    assert len(lanes) == 4 and len(forks) == 2  # a lane that reads shares its cell's fork
    assert all(len(fork.caches) == len(fork.states) == 2 for fork in forks)
    wave = engine.begin(Job(ask("0"), [Variant(H2O(), 12)]))
    (lane,) = wave.lanes
    assert lane.fork.caches == lane.fork.states == []
    wave.step()
    assert len(lane.result.tokens) == 2
