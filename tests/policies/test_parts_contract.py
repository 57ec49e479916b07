"""Allocators and stores that break their contract: the sample fails with one line, and the others go on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from policies.adakv import AdaKV
from policies.h2o import H2O
from policies.parts import Allocator, Store
from policies.snapkv import SnapKV
from src.engine.engine import Engine
from src.engine.pool import Pool
from src.engine.request import Generation, Job, Request, Variant
from src.kv.cache import LayerCache
from src.kv.shares import ByLayer
from tests.support import naive
from tests.support.tiny import tiny, tokens

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

BUDGET = 16
Wrong = Callable[..., Any]


@dataclass
class BadPlan:
    """Everybody holds the budget, and answers go through `wrong`."""

    wrong: Mapping[str, Wrong]
    plan: ByLayer
    revises: bool = False

    def told(self, layer: int) -> Any:
        return self.wrong.get("told", lambda told, layer: told)(self.plan.told(layer), layer)

    def cut(self, prompt: Any, scores: Any) -> Any:
        return self.wrong.get("cut", lambda counts, layer: counts)(self.plan.cut(prompt, scores), prompt.layer)


@dataclass(frozen=True)
class Bad(Allocator):
    wrong: dict[str, Wrong] = field(default_factory=dict, hash=False)
    shrinks: bool = False

    @property
    def revises(self) -> bool:
        return self.shrinks

    def plan(self, allotment: Any) -> Any:
        plan = BadPlan(self.wrong, ByLayer.uniform(allotment), self.shrinks)
        return self.wrong.get("plan", lambda plan: plan)(plan)


@dataclass(frozen=True)
class BadStore(Store):
    wrong: dict[str, Wrong] = field(default_factory=dict, hash=False)

    def hold(self, prompt: Any, kept: Sequence[Any], limit: int | None) -> Any:
        return self.wrong["hold"](prompt, kept, limit)


def fails(*_: Any) -> Any:
    raise ValueError("a bug:\nmore")


def late(counts: Any, layer: int) -> Any:
    """The first layer shrinks when the last comes."""
    return {**counts, 0: [BUDGET - 4] * 2} if layer == 1 else counts


FAULTS: dict[str, tuple[Any, str]] = {
    "raises": (Bad({"plan": fails}), "allocate raised ValueError: a bug: more (test_parts_contract.py:"),
    "no plan": (Bad({"plan": lambda plan: None}), "allocate gave None; expected a Plan"),
    "tells too little": (
        Bad({"told": lambda t, layer: 8}),
        "allocate tells layer 0 int 8; expected a whole number from 9,",
    ),
    "tells too much": (Bad({"told": lambda t, layer: t + 99 * layer}), "allocate tells layer 1 int 115;"),
    "tells no number": (Bad({"told": lambda t, layer: 9.5}), "tells layer 0 float 9.5"),
    "told raises": (Bad({"told": fails}), "allocate raised ValueError: a bug: more"),
    "cut raises": (Bad({"cut": fails}), "allocate raised ValueError: a bug: more (layer 0"),
    "a list": (Bad({"cut": lambda c, layer: [16, 16]}), "allocate gave list [16, 16]; expected counts for layer 0"),
    "one head": (
        Bad({"cut": lambda c, layer: {layer: [16]}}),
        "gave layer 0 list [16]; expected a whole number for each",
    ),
    "none": (Bad({"cut": lambda c, layer: {layer: [32, 0]}}), "gave layer 0 list [32, 0]; expected a whole number"),
    "floats": (Bad({"cut": lambda c, layer: {layer: [16.0, 16.0]}}), "gave layer 0 list [16.0, 16.0]"),
    "more than there are": (Bad({"cut": lambda c, layer: {layer: [41, 9]}}), "from 1 to what it had, [40, 40]"),
    "a later layer": (
        Bad({"cut": lambda c, layer: {**c, 7: [9, 9]}}),
        "expected counts for layer 0 (the plan does not",
    ),
    "an earlier layer": (Bad({"cut": late}), "expected counts for layer 1 (the plan does not revise)"),
    "below what stays": (
        Bad({"cut": lambda c, layer: {layer: [24, 8]} if layer else c}),
        "",  # as many as stay is enough for the engine
    ),
    "far below what stays": (
        Bad({"cut": lambda c, layer: {layer: [25, 7]} if layer else c}),
        "allocate gave 7 entries to KV head 1; expected 8 or more, which always stay (layer 1)",
    ),
    "wrong total": (
        Bad({"cut": lambda c, layer: {layer: [16, 17]}}),
        "allocate gave 66 entries to all layers and heads together; expected 64",
    ),
    "wrong total in the end": (Bad({"cut": late}, shrinks=True), "gave 56 entries to all layers and heads together"),
    "grows again": (
        Bad(
            {"cut": lambda c, layer: {0: [8 + 8 * layer] * 2, layer: [16] * 2} if layer else {0: [8, 8]}}, shrinks=True
        ),
        "gave layer 0 list [16, 16]; expected a whole number for each KV head, from 1 to what it had, [8, 8]",
    ),
    "store raises": (BadStore({"hold": fails}), "raised ValueError: a bug: more (layer 0"),
    "store of nothing": (
        BadStore({"hold": lambda *_: None}),
        "gave None; expected a LayerCache with positions (1, 2, 16)",
    ),
    "store of everything": (
        BadStore(
            {"hold": lambda p, kept, limit: LayerCache(p.keys[None], p.values[None], p.keys[None, ..., 0], [40], limit)}
        ),
        "expected a LayerCache with positions (1, 2, 16)",
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


OTHERS = [Variant(H2O(), BUDGET), Variant(SnapKV(window=8, allocate=AdaKV()), BUDGET)]


def jobs(variants: list[Variant]) -> list[Job]:
    return [Job(Request(str(n), tokens(n, seed=n)[0].tolist(), frozenset(), 8), variants) for n in (40, 12)]


def outcome(one: Generation) -> Any:
    return one.error, one.tokens, [layer.tolist() for layer in one.kept_prompt + one.kept_end], one.kv_bytes


@pytest.mark.parametrize("name", FAULTS)
def test_the_sample_fails_and_the_others_go_on(model: Any, name: str) -> None:
    part, words = FAULTS[name]
    policy = SnapKV(window=8, **{"store" if isinstance(part, Store) else "allocate": part})
    variants = [OTHERS[0], Variant(policy, BUDGET), OTHERS[1]]
    found = {(g.request.name, g.variant): g for g in Engine(model, 100).run(jobs(variants))}
    plain = {(g.request.name, g.variant): g for g in Engine(model, 100).run(jobs(OTHERS))}
    assert all(outcome(found[key]) == outcome(one) for key, one in plain.items())
    failed = found["40", variants[1]]
    if not words:
        assert failed.error is None
        return
    assert failed.error is not None and failed.error.startswith("policy SnapKV: ") and "\n" not in failed.error
    assert words in failed.error, failed.error
    assert failed.tokens == [] and failed.kept_prompt == []
    if isinstance(part, Allocator):  # a prompt that fits asks nobody
        assert found["12", variants[1]].error is None


def test_a_plan_may_shrink_what_it_gave(model: Any) -> None:
    """The same counts, given at once and in two steps, keep the same."""

    def counts(last: list[int]) -> Wrong:
        return lambda c, layer: {layer: [20, 12]} if layer == 0 else {0: [20, 12], 1: last}

    cut = {"cut": lambda c, layer: {layer: [20, 12]} if layer == 0 else {1: [14, 18]}}
    steps = {"cut": lambda c, layer: {0: [38, 30]} if layer == 0 else {0: [20, 12], 1: [14, 18]}}
    found = [
        outcome(next(Engine(model, 9).run(jobs([Variant(SnapKV(window=8, allocate=part), BUDGET)]))))
        for part in (Bad(cut), Bad(steps, shrinks=True))
    ]
    assert found[0] == found[1] and found[0][0] is None


def test_lanes_of_prompts_of_differing_lengths_share_a_pool(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    init = Pool.__init__
    monkeypatch.setattr(Pool, "__init__", lambda self, forks, row: (made.append(len(forks)), init(self, forks, row))[1])
    cell = Variant(H2O(allocate=AdaKV()), 20)
    asked = [Job(Request(str(n), tokens(n, seed=n)[0].tolist(), frozenset(), 8), [cell]) for n in (63, 40, 51)]
    together = {g.request.name: outcome(g) for g in Engine(model, 100).run(asked)}
    assert made == [3]
    assert together == {g.request.name: outcome(g) for job in asked for g in Engine(model, 1).run([job])}
