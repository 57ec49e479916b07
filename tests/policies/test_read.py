"""Readers beside every kind of policy: loops over the full attention, and what must hold of the tally in any case."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from policies.adakv import AdaKV
from policies.ahakv import AhaKV
from policies.base import Policy
from policies.full import Full
from policies.h2o import H2O
from policies.hcattention import HCAttention
from policies.kivi import KIVI
from policies.parts import Reader
from policies.pyramidkv import Pyramid
from policies.scope import Scope
from policies.smallest_set import SmallestSet
from policies.snapkv import SnapKV
from policies.streaming_llm import StreamingLLM
from policies.think import ThinK
from policies.tova import TOVA
from src.config.cells import make_cell, policy_config
from src.engine.engine import Engine
from src.engine.probes import LaneView, Probe
from src.engine.request import Generation, Job, Request, Variant
from src.errors import InputError
from src.kv.state import State
from src.kv.step import DecodeStep
from tests.policies.test_parts_oracle import Heads
from tests.support import naive
from tests.support.naive import Naive, Row, softmax
from tests.support.naive_parts import NaiveParts
from tests.support.tiny import tiny, tokens
from tests.support.watch import logits_of

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

NEW, BUDGET, LAYERS, KV_HEADS, GROUP = 31, 24, 2, 2, 2
CELLS: dict[str, Policy] = {
    "full": Full(),
    "snapkv": SnapKV(window=8),
    "h2o": H2O(),
    "ahakv": AhaKV(window=8),
    "streaming": StreamingLLM(),
    "snapkv adakv": SnapKV(window=8, allocate=AdaKV()),
    "h2o adakv": H2O(allocate=AdaKV()),
    "h2o pyramid": H2O(allocate=Pyramid(3)),
    "snapkv adakv think": SnapKV(window=8, allocate=AdaKV(), store=ThinK(recent=4, rows=16)),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", torch.float64)


def request(n: int, **more: Any) -> Request:
    return Request(str(n), tokens(n, seed=n)[0].tolist(), frozenset(), NEW, **more)


class Reads(Naive):
    """Attends to the largest weights, one after the other, until they add up to tau; counts on its fingers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.picks: Counter[tuple[int, int, int]] = Counter()  # layer, KV head, position
        self.counts: dict[tuple[int, int], list[tuple[int, int]]] = {}  # layer, step -> chosen, held of every head

    def read(self, layer: int, h: int, row: Row) -> tuple[Row, float]:
        reader, weights = self.policy.read, softmax(row)
        assert isinstance(reader, SmallestSet)
        chosen: list[int] = []
        while sum(weights[j] for j in chosen) < reader.tau and len(chosen) < len(row):
            chosen.append(max((j for j in row if j not in chosen), key=lambda j: weights[j]))
        self.picks.update((layer, h // self.group, j) for j in chosen)
        self.counts.setdefault((layer, self.step), []).append((len(chosen), len(row)))
        return {j: row[j] for j in chosen}, 1.0 if reader.renormalise else sum(weights[j] for j in chosen)


@pytest.mark.parametrize("length", [63, 15])
@pytest.mark.parametrize("name", CELLS)
def test_as_the_loops(model: Any, name: str, length: int) -> None:
    check_loops(model, replace(CELLS[name], read=SmallestSet(0.7)), length)


@pytest.mark.parametrize("name", ["full", "snapkv", "snapkv adakv"])
def test_as_the_loops_without_renormalising(model: Any, name: str) -> None:
    """(Of policies that do not look at a step's weights: the loops' rows are logits.)"""
    check_loops(model, replace(CELLS[name], read=SmallestSet(0.7, renormalise=False)), 40)


class NaiveReads(Reads, NaiveParts):
    """The same with parts."""


def check_loops(model: Any, policy: Policy, length: int) -> None:
    got: list[Generation] = []
    asked = request(length)
    history, jobs = Heads(), [Job(asked, [Variant(policy, BUDGET)])]
    logits = logits_of(model, lambda: got.extend(Engine(model, 9, [history]).run(jobs)))
    kind = NaiveReads if policy.allocate or policy.store else Reads
    loops = kind(model, policy, BUDGET, lambda step, layer, head: set(history.kept[got[0]][step][layer][head]))
    expected = loops.run(asked.ids, NEW)
    assert got[0].error is None and got[0].tokens == expected.tokens
    close = 1e-4 if isinstance(policy, StreamingLLM) else 1e-8  # its rotations are the model's, in float32
    for mine, theirs in zip(logits[-NEW + 1 :], expected.logits[1:], strict=True):  # before: how the model rotates
        assert torch.allclose(mine[0], theirs, atol=close)
    assert held(got[0].kept_end) == expected.kept[-1]
    bins = [0.0] * 64
    for layer, (positions, picks) in enumerate(zip(got[0].kept_end, got[0].picks, strict=True)):
        assert positions.shape == picks.shape
        for g in range(KV_HEADS):
            for position, count in zip(positions[g].tolist(), picks[g].tolist(), strict=True):
                assert count == (loops.picks[layer, g, position] if position >= 0 else 0)
                if 0 <= position < length:
                    bins[position * 64 // length] += count
    steps = range(1, NEW)
    means = {at: [sum(n) / len(n) for n in zip(*counts, strict=True)] for at, counts in loops.counts.items()}
    extra = got[0].extra
    share = sum(chosen / there for chosen, there in means.values()) / len(means)
    assert extra["chosen_share"] == pytest.approx(share, abs=1e-6)
    by_step = [sum(means[layer, step][0] for layer in range(LAYERS)) / LAYERS for step in steps]
    assert extra["chosen_by_step"] == pytest.approx(by_step, abs=0.006)
    by_layer = [sum(means[layer, step][0] for step in steps) / len(steps) for layer in range(LAYERS)]
    assert extra["chosen_by_layer"] == pytest.approx(by_layer, abs=0.006)
    assert extra["chosen_positions"] == pytest.approx([b / sum(bins) for b in bins], abs=1e-6)


def held(layers: list[torch.Tensor]) -> list[list[list[int]]]:
    return [[sorted(p for p in head if p >= 0) for head in layer.tolist()] for layer in layers]


WHOLE: list[Policy] = [
    # A sum over a window of rows that attended to few tokens leaves many at 0, give or take a rounding: a tie.
    *(replace(p, decode_score="running") if isinstance(p, AhaKV) else p for p in CELLS.values()),
    TOVA(),  # turns tokens away
    *(Scope(strategy=strategy) for strategy in ("slide", "adaptive", "discontinuous")),  # shrinks its cache, too
    SnapKV(window=8, allocate=AdaKV(), store=KIVI(8, 8, 8)),
    H2O(store=KIVI(8, 8, 8)),
]


def test_a_reader_that_takes_everything_changes_nothing_and_counts_right(model: Any) -> None:
    """Of every token that is held: all query heads, at every step since it came. All cells in one wave, of lengths that
    begin above and below the budget, beside each other's readers, with lanes that read a reference answer."""
    cells = [p for policy in WHOLE for p in (policy, replace(policy, read=SmallestSet(1.0)))]
    variants = [Variant(policy, BUDGET if policy.uses_budget else None) for policy in cells]
    requests = [request(n, reference=tokens(5, seed=4)[0].tolist()) for n in (50, 15)]
    done = list(Engine(model, 1000).run([Job(r, variants) for r in requests]))
    found = {(g.request.name, id(g.variant)): g for g in done}
    for r in requests:
        for plain, reading in zip(variants[::2], variants[1::2], strict=True):
            one, other = found[r.name, id(plain)], found[r.name, id(reading)]
            assert one.error is other.error is None
            assert one.tokens == other.tokens and held(one.kept_end) == held(other.kept_end)
            assert one.fidelity == other.fidelity and one.kv_bytes == other.kv_bytes
            assert one.picks == [] and "chosen_share" not in one.extra
            assert other.extra["chosen_share"] == 1
            for positions, picks in zip(other.kept_end, other.picks, strict=True):
                since = NEW - 1 - (positions - len(r.ids)).clamp_min(0)
                assert torch.equal(picks, torch.where(positions >= 0, since * GROUP, 0).int()), plain.policy


class Attended(Probe):
    """Of every step, what share of each entry's query heads attended to it."""

    def __init__(self) -> None:
        self.found: dict[Generation, list[Any]] = {}

    def on_step(self, lane: LaneView) -> None:
        shares = lane.attended()
        assert shares is not None and all(s.shape == k.shape for s, k in zip(shares, lane.kept, strict=True))
        step = [
            {p: s for p, s in zip(k.tolist(), row.tolist(), strict=True) if p >= 0}
            for kept, share in zip(lane.kept, shares, strict=True)
            for k, row in zip(kept, share, strict=True)
        ]
        self.found.setdefault(lane.generation, []).append(step)


def test_alone_and_in_a_wave(model: Any) -> None:
    """Two settings of a reader, several policies, ragged and not, lengths that differ: each as it is alone."""
    readers = (SmallestSet(0.5), SmallestSet(0.9, renormalise=False))
    cells = [replace(policy, read=reader) for policy in WHOLE for reader in readers]
    variants = [Variant(policy, BUDGET if policy.uses_budget else None) for policy in cells]
    requests = [request(n) for n in (50, 33, 15)]
    wave = Attended()
    together = {
        (g.request.name, id(g.variant)): g
        for g in Engine(model, 1000, [wave]).run([Job(r, variants) for r in requests])
    }
    for r in requests[::2]:
        for variant in variants:
            by_itself = Attended()
            (alone,) = Engine(model, 1, [by_itself]).run([Job(r, [variant])])
            other = together[r.name, id(variant)]
            assert alone.error is None and alone.tokens == other.tokens and alone.extra == other.extra
            assert by_itself.found[alone] == wave.found[other]
            assert by_position(alone) == by_position(other)
            assert alone.bookkeeping_bytes == other.bookkeeping_bytes


def by_position(g: Generation) -> list[dict[int, int]]:
    return [
        {p: n for p, n in zip(head.tolist(), counts.tolist(), strict=True) if p >= 0}
        for positions, picks in zip(g.kept_end, g.picks, strict=True)
        for head, counts in zip(positions, picks, strict=True)
    ]


@dataclass(frozen=True)
class Latest(Reader):
    """The last token and, at odd steps, everything."""

    def choose(self, step: DecodeStep) -> torch.Tensor | None:
        chosen = torch.zeros_like(step.weights, dtype=torch.bool)
        chosen[..., -1] = True
        return None if step.t % 2 else chosen


@dataclass(frozen=True)
class Watcher(SnapKV):
    """Notes what it is shown."""

    def observe(self, step: DecodeStep, state: State) -> None:
        shown.append((step.t, step.weights.clone(), step.logits.softmax(-1)))


shown: list[tuple[int, torch.Tensor, torch.Tensor]] = []


def test_a_policy_sees_what_the_model_used(model: Any) -> None:
    shown.clear()
    (got,) = Engine(model).run([Job(request(40), [Variant(Watcher(window=8, read=Latest()), BUDGET)])])
    assert got.error is None and len(shown) == LAYERS * (NEW - 1)
    for t, weights, of_logits in shown:
        assert torch.allclose(weights, of_logits)
        assert (weights[..., -1] == 1).all() == (t % 2 == 0)
    assert got.extra["chosen_by_step"][:4] == [1, BUDGET + 2, 1, BUDGET + 4]


@dataclass(frozen=True)
class OldHook(H2O):
    def adjust_weights(self, step: Any, state: Any) -> None: ...


@dataclass(frozen=True)
class OldRecord(H2O):
    def attended(self, state: Any) -> Any: ...


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"OldHook.adjust_weights is no hook any more; valid: read, a Reader"):
        OldHook()
    with pytest.raises(ValueError, match=r"OldRecord.attended is no hook any more; valid: read"):
        OldRecord()
    with pytest.raises(ValueError, match=r"read=.*valid"):
        H2O(read=AdaKV())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"read=SmallestSet: HCAttention reads as its tau says; valid: null"):
        HCAttention(read=SmallestSet())
    for tau in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"tau={tau}: valid"):
            SmallestSet(tau)
    with pytest.raises(InputError, match=r"policy=hcattention: read=SmallestSet.*valid: null"):
        make_cell(policy_config({"name": "hcattention", "read": "mass"}), None)


def test_names_and_notes() -> None:
    cell = make_cell(policy_config({"name": "snapkv", "allocate": "mass", "read": "mass"}), 64)
    assert cell.label == "snapkv+mass+read_mass"
    assert "HCAttention" in cell.variant.policy.reconstructed() and SnapKV().reconstructed() == ""
