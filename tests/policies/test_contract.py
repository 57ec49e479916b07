"""Policies that break their contract: the sample fails with one line that names policy, hook and layer; every other
cell of the wave comes to what it comes to alone."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from policies.base import Policy, ScorePolicy, keep_all, lowest_slot
from policies.full import Full
from policies.h2o import H2O
from policies.parts import Reader
from policies.random import Random
from policies.recent import Recent
from policies.scope import Scope
from policies.snapkv import SnapKV
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from src.kv.cache import LayerCache
from src.kv.state import State
from src.session.trace_probe import TraceProbe
from tests.support import naive
from tests.support.tiny import tiny, tokens

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

BUDGET = 12


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def ask(name: str, length: int = 30, **more: Any) -> Request:
    ids = tokens(length, seed=int(name))[0].tolist()
    return Request(name, ids, frozenset(), more.pop("max_new_tokens", 6), **more)


Wrong = Callable[..., Any]


@dataclass(frozen=True)
class BadReader(Reader):
    """Chooses what `wrong` says of everything."""

    wrong: Wrong = field(default=lambda chosen, step: chosen, hash=False)

    def __post_init__(self) -> None: ...  # a function is no setting

    def choose(self, step: Any) -> Any:
        return self.wrong(step.weights > -1, step)


@dataclass(frozen=True)
class Bad(Policy):
    """`Recent`, whose answers go through `wrong[hook](answer, *arguments)`."""

    wrong: dict[str, Wrong] = field(default_factory=dict, hash=False)
    evicts_while_decoding = True

    def _answer(self, hook: str, answer: Any, *arguments: Any) -> Any:
        return self.wrong[hook](answer, *arguments) if hook in self.wrong else answer

    def keep_prompt(self, prompt: Any, budget: int) -> Any:
        return self._answer("keep_prompt", keep_all(prompt)[:, -budget:], prompt)

    def start(self, prompt: Any, kept: Any, budget: int) -> Any:
        state = State(slots={"sum": torch.zeros(kept.shape)}, fixed={"n": torch.tensor(1)})
        return self._answer("start", state, prompt)

    def limit(self, budget: int, kept: int) -> Any:
        return self._answer("limit", budget)

    def make_cache(self, prompt: Any, kept: Any, limit: int | None) -> Any:
        return self._answer("make_cache", super().make_cache(prompt, kept, limit), prompt)

    def adjust_logits(self, step: Any) -> None:
        self._answer("adjust_logits", None, step)

    @property
    def reader(self) -> Any:
        return BadReader(self.wrong["read"]) if "read" in self.wrong else None

    def observe(self, step: Any, state: Any) -> None:
        self._answer("observe", state, step)

    def prune(self, step: Any, state: Any) -> Any:
        return self._answer("prune", None, step)

    def evict(self, step: Any, state: Any) -> Any:
        return self._answer("evict", step.positions.argmin(dim=-1), step)

    def prompt_measures(self, prompt: Any, budget: int) -> Any:
        return self._answer("prompt_measures", {}, prompt)

    def measures(self, states: Any, lane: int) -> Any:
        return self._answer("measures", {})


@dataclass(frozen=True)
class BadOwn(Bad):
    """The same with a cache of its own."""

    own_pool = True

    def room(self, t: int, limit: int) -> Any:
        return self._answer("room", limit, t)


@dataclass(frozen=True)
class BadScore(ScorePolicy):
    """Scores by position, changed by `wrong`."""

    wrong: dict[str, Wrong] = field(default_factory=dict, hash=False)
    evicts_while_decoding = True

    def recent(self, budget: int) -> Any:
        return self.wrong.get("recent", lambda r: r)(4)

    def score(self, prompt: Any, budget: int) -> Any:
        scores = torch.arange(float(prompt.length)).expand(prompt.kv_heads, -1).clone()
        return self.wrong.get("score", lambda s: s)(scores)

    def evict(self, step: Any, state: Any) -> Any:
        scores = self.wrong.get("evict", lambda s: s)(step.positions.float())
        return lowest_slot(scores, self.protect_recent(step))


def put(index: Any, value: Any) -> Wrong:
    """The answer with some of its numbers replaced."""

    def change(answer: Any, *_: Any) -> Any:
        answer = answer.clone()
        answer[index] = value
        return answer

    return change


def fails(error: BaseException, at: Callable[[Any], bool] = lambda _: True) -> Wrong:
    def change(answer: Any, about: Any = None) -> Any:
        if at(about):
            raise error
        return answer

    return change


def damage(state: State, name: str, value: Any) -> State:
    (state.slots if name in state.slots else state.fixed)[name] = value
    return state


NO_STATE: Any = State(slots={"sum": torch.zeros(2, 3)})
PROMPT: dict[str, tuple[str, Wrong, str]] = {
    # case: hook, what it gives instead, what the line says
    "raises": (
        "keep_prompt",
        fails(RuntimeError("a bug:\nmore")),
        "raised RuntimeError: a bug: more (layer 0, test_con",
    ),
    "raises without text": (
        "keep_prompt",
        fails(AssertionError()),
        "raised AssertionError (layer 0, test_contract.py:",
    ),
    "raises in a later layer": ("keep_prompt", fails(KeyError("x"), lambda p: p.layer == 1), "KeyError: 'x' (layer 1"),
    "leaves the process": ("keep_prompt", fails(SystemExit(0)), "raised SystemExit: 0 (layer 0"),
    "None": ("keep_prompt", lambda k, _: None, "gave None; expected positions (2, k), 1 <= k <= 12"),
    "list": ("keep_prompt", lambda k, _: [0, 1], "gave list [0, 1]; expected positions"),
    "float": ("keep_prompt", lambda k, _: k.float(), "gave shape (2, 12), float32"),
    "bool": ("keep_prompt", lambda k, _: k > 0, "gave shape (2, 12), bool"),
    "one dimension": ("keep_prompt", lambda k, _: k[0], "gave shape (12,), int64"),
    "three dimensions": ("keep_prompt", lambda k, _: k[None], "gave shape (1, 2, 12)"),
    "one head": ("keep_prompt", lambda k, _: k[:1], "gave shape (1, 12)"),
    "empty": ("keep_prompt", lambda k, _: k[:, :0], "gave shape (2, 0)"),
    "too many": ("keep_prompt", lambda k, p: keep_all(p), "gave shape (2, 30), int64, on cpu; expected positions"),
    "one too many": ("keep_prompt", lambda k, p: keep_all(p)[:, :13], "gave shape (2, 13)"),
    "all the same": ("keep_prompt", lambda k, _: k * 0, "gave a position more than once; expected distinct"),
    "one twice": ("keep_prompt", put((1, 3), 29), "keep_prompt gave a position more than once"),
    "beyond the end": ("keep_prompt", put((0, 11), 30), "gave position 30; expected positions from 0 to 29 (layer 0)"),
    "far beyond": ("keep_prompt", put((0, 11), 2**40), "gave position 1099511627776; expected"),
    "negative": ("keep_prompt", put((1, 0), -1), "gave position -1; expected positions from 0 to 29"),
    "limit None": ("limit", lambda _: None, "limit gave None; expected a whole number, from 12, what was kept, to 12"),
    "limit negative": ("limit", lambda _: -1, "gave int -1"),
    "limit a float": ("limit", lambda _: 12.0, "gave float 12.0"),
    "limit four times the budget": ("limit", lambda b: 4 * b, "gave int 48; expected a whole number, from 12"),
    "limit raises": ("limit", fails(ValueError("x")), "limit raised ValueError: x (layer 0"),
    "cache None": ("make_cache", lambda c, _: None, "make_cache gave None; expected a LayerCache"),
    "cache of everything": (
        "make_cache",
        lambda c, p: LayerCache.from_prompt(p.keys, p.values, keep_all(p), c.limit),
        "expected a LayerCache with positions (1, 2, 12)",
    ),
    "cache without a limit": (
        "make_cache",
        lambda c, p: LayerCache(c.keys, c.values, c.positions, c.used, None),
        "expected keys (1, 2, 12) and limit 12",
    ),
    "state None": ("start", lambda s, _: None, "start gave None; expected a State"),
    "state of others": ("start", lambda s, _: State(slots={"a": torch.zeros(2, 3)}), "slots['a'] of shape (2, 3)"),
    "state with a list": ("start", lambda s, _: State(fixed={"a": [1]}), "gave 'a' = list [1]; expected tensors"),
    "start raises": ("start", fails(IndexError("i")), "start raised IndexError: i (layer 0, test_contract.py:"),
    "prompt_measures a list": ("prompt_measures", lambda m, _: [1], "prompt_measures gave list [1]; expected a dict"),
    "prompt_measures numbers": ("prompt_measures", lambda m, _: {"a": 1}, "expected a dict of names and tensors"),
    "prompt_measures of one layer": (
        "prompt_measures",
        lambda m, p: {"a": torch.tensor(0)} if p.layer == 0 else {},
        "prompt_measures raised KeyError: 'a'",
    ),
}
DECODING: dict[str, tuple[str, Wrong, str]] = {
    "raises": ("evict", fails(ZeroDivisionError("division by zero")), "ZeroDivisionError: division by zero (layer 0"),
    "raises late": (
        "evict",
        fails(ValueError("v"), lambda s: s.t == 3 and s.layer == 1),
        "ValueError: v (layer 1, tes",
    ),
    "None": ("evict", lambda e, _: None, "evict gave None; expected slots (1, 2), int64 (layer 0)"),
    "float": ("evict", lambda e, _: e.float(), "gave shape (1, 2), float32"),
    "one dimension more": ("evict", lambda e, _: e[..., None], "gave shape (1, 2, 1)"),
    "one head": ("evict", lambda e, _: e[:, :1], "gave shape (1, 1)"),
    "no lanes": ("evict", lambda e, _: e[0], "gave shape (2,)"),
    "list": ("evict", lambda e, _: e.tolist(), "gave list"),
    "beyond": ("evict", put((0, 1), 9999), "gave slot 9999; expected a slot from 0 to 11 (layer 0, KV head 1)"),
    "just beyond": ("evict", put((0, 0), 12), "gave slot 12; expected a slot from 0 to 11 (layer 0, KV head 0)"),
    "negative": ("evict", put((0, 0), -2), "gave slot -2; expected a slot from 0 to 11"),
    "negative in a later layer": (
        "evict",
        lambda e, s: e - 100 if s.layer == 1 and s.t == 2 else e,
        "expected a slot from 0 to 11 (layer 1, KV head 0)",
    ),
    "adjust_logits": ("adjust_logits", fails(ValueError("l")), "adjust_logits raised ValueError: l (layer 0"),
    "read": ("read", fails(ValueError("w")), "read raised ValueError: w (layer 0"),
    "read shape": (
        "read",
        lambda c, _: c[..., :-1],
        "read gave shape (1, 2, 2, 12), bool, on cpu; expected (1, 2, 2, 13)",
    ),
    "read weights": ("read", lambda c, _: c.float(), "read gave shape (1, 2, 2, 13), float32, on cpu; expected"),
    "read a list": ("read", lambda c, _: c.tolist(), "read gave list"),
    "read nothing": (
        "read",
        lambda c, s: c & False if s.t == 2 else c,
        "adjust_logits, read left logits that are not numbers",
    ),
    "observe": ("observe", fails(TypeError("o")), "observe raised TypeError: o (layer 0"),
    "prune": ("prune", fails(TypeError("p")), "prune raised TypeError: p (layer 0"),
    "prune without a pool": ("prune", lambda _, s: s.positions[..., :4].long(), "expected None, or own_pool = True"),
    "state narrower": (
        "observe",
        lambda s, _: damage(s, "sum", s.slots["sum"][..., :-1]),
        "left slots['sum'] of shape (1, 2, 12), float32, on cpu; expected (1, 2, ..., 13) (layer 0)",
    ),
    "state of no lane": ("observe", lambda s, _: damage(s, "n", torch.zeros(3)), "left fixed['n'] of shape (3,)"),
    "state no tensor": ("observe", lambda s, _: damage(s, "sum", None), "observe raised AttributeError"),
    "measures raises": ("measures", fails(ValueError("m")), "measures raised ValueError: m (test_contract.py:"),
    "measures a list": ("measures", lambda _: [1], "measures gave list [1]; expected a dict"),
}
OWN: dict[str, tuple[str, Wrong, str]] = {
    "room a float": ("room", lambda room, t: 3.5, "room gave float 3.5; expected a whole number from 1 to 12"),
    "room above the limit": ("room", lambda room, t: room + 1, "gave int 13; expected a whole number from 1 to 12"),
    "room negative": ("room", lambda room, t: -1, "gave int -1"),
    "room raises": ("room", fails(ValueError("r")), "room raised ValueError: r (layer 0"),
    "prune nothing": ("prune", lambda _, s: s.positions[..., :0].long(), "gave shape (1, 2, 0)"),
    "prune one head": ("prune", lambda _, s: s.positions[:, :1, :3].long(), "gave shape (1, 1, 3)"),
    "prune floats": ("prune", lambda _, s: s.positions[..., :3].float(), "gave shape (1, 2, 3), float32"),
    "prune keeps all": (
        "prune",
        lambda _, s: torch.arange(12).expand(1, 2, -1),
        "expected slots (1, 2, k), 1 <= k <= 11",
    ),
    "prune twice": ("prune", lambda _, s: torch.zeros(1, 2, 3).long(), "prune gave slots [0, 0, 0]; expected distinct"),
    "prune beyond": ("prune", lambda _, s: torch.tensor([3, 99]).expand(1, 2, -1), "gave slots [3, 99]; expected"),
}
SCORES: dict[str, tuple[str, Wrong, str]] = {
    "NaN": ("score", lambda s: s * float("nan"), "score gave NaN for a token; expected numbers"),
    "one NaN": ("score", put((1, 3), float("nan")), "score gave NaN for a token"),
    "all infinite": ("score", lambda s: s * 0 + float("inf"), "gave the same infinity for all tokens of a head"),
    "all minus infinite": ("score", lambda s: s * 0 - float("inf"), "gave the same infinity for all tokens"),
    "short": ("score", lambda s: s[:, :-7], "gave shape (2, 23), float32, on cpu; expected numbers (2, n), n from 26"),
    "one head": ("score", lambda s: s[:1], "gave shape (1, 26)"),
    "one dimension": ("score", lambda s: s[0], "gave shape (30,)"),
    "bool": ("score", lambda s: s > 3, "bool"),
    "complex": ("score", lambda s: s + 0j, "complex64"),
    "None": ("score", lambda s: None, "score gave None"),
    "list": ("score", lambda s: s.tolist(), "score gave list"),
    "recent above the budget": (
        "recent",
        lambda r: BUDGET + 1,
        "recent gave int 13; expected a whole number from 0 to 12",
    ),
    "recent negative": ("recent", lambda r: -1, "recent gave int -1"),
    "recent a float": ("recent", lambda r: 2.5, "recent gave float 2.5"),
    "NaN while decoding": (
        "evict",
        lambda s: s * float("nan"),
        "evict gave slot -1 (lowest_slot gives -1 where a score",
    ),
    "one NaN while decoding": (
        "evict",
        put((0, 1, 2), float("nan")),
        "expected a slot from 0 to 11 (layer 0, KV head 1)",
    ),
}
CASES = [("Bad", *case) for case in PROMPT.items()] + [("Bad", *case) for case in DECODING.items()]
CASES += [("BadOwn", *case) for case in OWN.items()] + [("BadScore", *case) for case in SCORES.items()]
OTHERS = [Variant(Full(), None), Variant(H2O(), BUDGET), Variant(Recent(), BUDGET), Variant(Random(window=2), BUDGET)]


def outcome(generation: Generation) -> Any:
    kept = [[layer.tolist() for layer in kept] for kept in (generation.kept_prompt, generation.kept_end)]
    return generation.error, generation.tokens, kept, generation.kv_bytes


@pytest.fixture(scope="module")
def alone(model: Any) -> dict[tuple[str, Variant], Any]:
    """What the sound cells come to without the faulty one."""
    results = Engine(model, 100).run([Job(ask(str(i)), OTHERS) for i in range(2)])
    return {(g.request.name, g.variant): outcome(g) for g in results}


@pytest.mark.parametrize(("kind", "name", "case"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_the_sample_fails_and_the_others_do_not_notice(model: Any, alone: Any, kind: str, name: str, case: Any) -> None:
    hook, wrong, words = case
    policy = getattr(sys.modules[__name__], kind)(wrong={hook: wrong})
    variants = [*OTHERS[:2], Variant(policy, BUDGET), *OTHERS[2:]]
    results = list(Engine(model, 100).run([Job(ask(str(i)), variants) for i in range(2)]))
    found = {(g.request.name, g.variant): g for g in results}
    assert len(results) == len(found) == 2 * len(variants)
    for key, expected in alone.items():
        assert outcome(found[key]) == expected
    for i in range(2):
        failed = found[str(i), variants[2]]
        assert failed.error is not None and re.match(rf"policy {kind}: (adjust_logits, )?{hook} ", failed.error), (
            failed.error
        )
        assert words in failed.error and "\n" not in failed.error, failed.error
        assert failed.tokens == failed.kept_prompt == failed.kept_end == [] and failed.extra == {}


@pytest.mark.parametrize("kind", [Bad, BadOwn, BadScore])
def test_without_a_fault_these_policies_run(model: Any, kind: Any) -> None:
    (result,) = Engine(model, 100).run([Job(ask("0"), [Variant(kind(), BUDGET)])])
    assert result.error is None and len(result.tokens) == 6 and result.kept_end[0].shape == (2, BUDGET)


SOUND: dict[str, tuple[str, Wrong]] = {
    "int32": ("keep_prompt", lambda k, _: k.int()),
    "unsorted": ("keep_prompt", lambda k, _: k.flip(-1)),
    "int32 slots": ("evict", lambda e, _: e.int()),
    "fewer": ("keep_prompt", lambda k, _: k[:, -3:]),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_does_no_harm_is_not_refused(model: Any, name: str) -> None:
    (hook, given), request = SOUND[name], ask("0")
    (result,) = Engine(model, 100).run([Job(request, [Variant(Bad(wrong={hook: given}), BUDGET)])])
    assert result.error is None
    if name != "fewer":
        (plain,) = Engine(model, 100).run([Job(request, [Variant(Recent(), BUDGET)])])
        assert result.tokens == plain.tokens
        assert all(torch.equal(a.sort().values, b) for a, b in zip(result.kept_prompt, plain.kept_prompt, strict=True))


def test_infinity_means_that_a_token_stays(model: Any) -> None:
    policy = BadScore(wrong={"score": put((slice(None), slice(0, 3)), float("inf"))})
    (result,) = Engine(model, 100).run([Job(ask("0"), [Variant(policy, BUDGET)])])
    assert result.error is None and result.kept_prompt[0][0, :3].tolist() == [0, 1, 2]


def test_nothing_is_asked_of_a_lane_that_has_room(model: Any) -> None:
    """A short prompt's empty slots may come to anything: they are not evicted from."""

    def wrong(scores: Any) -> Any:
        return scores.masked_fill(scores < 0, float("nan"))  # empty slots have the position -1

    policy = Variant(BadScore(wrong={"evict": wrong}), BUDGET)
    requests = [ask("0", 5, max_new_tokens=4), ask("1", 30)]
    results = list(Engine(model, 100).run([Job(request, [policy]) for request in requests]))
    assert [g.error for g in results] == [None, None]


def test_one_sample_s_fault_is_not_another_s(model: Any) -> None:
    """A policy is asked about all its samples at once; when it raises for one of them, the others are tried alone."""

    def wrong(victims: Any, step: Any) -> Any:
        if (step.position >= 40).any():
            raise ValueError("too far")
        return victims

    policy = Variant(Bad(wrong={"evict": wrong}), BUDGET)
    jobs = [Job(ask(str(i), 50 if i == 1 else 30), [OTHERS[1], policy]) for i in range(4)]
    found = {(g.request.name, g.variant): g for g in Engine(model, 100).run(jobs)}
    assert len(found) == 8
    for i in range(4):
        assert found[str(i), OTHERS[1]].error is None
        (single,) = Engine(model, 100).run([Job(jobs[i].request, [policy])])
        assert outcome(found[str(i), policy]) == outcome(single)
        assert (single.error is not None) == (i == 1)


def test_a_wrong_slot_costs_its_own_sample_only(model: Any) -> None:
    policy = Variant(Bad(wrong={"evict": lambda e, s: e.masked_fill((s.position >= 40)[:, None], -5)}), BUDGET)
    jobs = [Job(ask(str(i), 50 if i == 1 else 30), [policy]) for i in range(3)]
    results = {g.request.name: g for g in Engine(model, 100).run(jobs)}
    assert [bool(results[str(i)].error) for i in range(3)] == [False, True, False]
    assert "gave slot -5" in str(results["1"].error)
    assert results["0"].lanes == 3  # it was not tried again


@pytest.mark.parametrize("hook", ["keep_prompt", "evict", "measures"])
def test_with_a_reference_answer(model: Any, hook: str) -> None:
    """The lane that reads the reference ends with its cell; the others' fidelity is what it is alone."""
    request = ask("0", reference=tokens(9, seed=5)[0].tolist())
    broken = Variant(Bad(wrong={hook: fails(ValueError("x"))}), BUDGET)
    found = {g.variant: g for g in Engine(model, 100).run([Job(request, [broken, OTHERS[1]])])}
    (plain,) = Engine(model, 100).run([Job(request, [OTHERS[1]])])
    assert "raised ValueError: x" in str(found[broken].error) and found[broken].fidelity is None
    fidelity, expected = found[OTHERS[1]].fidelity, plain.fidelity
    assert fidelity is not None and expected is not None
    assert [fidelity[name] for name in ("nll", "kl")] == pytest.approx([expected[n] for n in ("nll", "kl")], rel=1e-5)
    assert found[OTHERS[1]].tokens == plain.tokens


def test_a_subclass_of_the_full_cache_is_not_what_others_are_compared_with(model: Any) -> None:
    class Cut(Full):
        uses_budget = True

        def keep_prompt(self, prompt: Any, budget: int) -> Any:
            return keep_all(prompt)[:, -budget:]

    request = ask("0", reference=tokens(9, seed=5)[0].tolist())
    (result,) = Engine(model, 100).run([Job(request, [Variant(Cut(), 6)])])
    assert result.fidelity is not None and float(str(result.fidelity["kl"])) > 0


def test_while_kept_positions_are_noted(model: Any) -> None:
    variants = [Variant(Bad(wrong={"evict": fails(ValueError("x"))}), BUDGET), OTHERS[1]]
    probe = TraceProbe(every=2)
    found = {}
    for result in Engine(model, 100, [probe]).run([Job(ask("0"), variants)]):
        found[result.variant] = result
        probe.take(result)
    assert not probe.traces
    assert [bool(found[v].error) for v in variants] == [True, False]


def test_a_prompt_pool_of_everything_is_allowed_where_the_policy_says_so(model: Any) -> None:
    (result,) = Engine(model, 100).run([Job(ask("0"), [Variant(Scope(prompt="full"), 20)])])
    assert result.error is None and result.kept_prompt[0].shape == (2, 30)


def test_values_are_read_once_per_prompt(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many cells and layers: the checks of values wait for the device once, beside the first token."""
    read: list[torch.Size] = []
    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        read.append(tensor.shape)
        return plain(tensor)

    engine = Engine(model, 100)
    variants = [Variant(H2O(), b) for b in (8, 12, 16)] + [Variant(SnapKV(window=4), 12)]
    job = Job(ask("0"), variants)
    with torch.inference_mode():
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        engine.prefill(job)
    assert [shape for shape in read if len(shape) == 1 and shape[0] > 20] == [torch.Size([4 * 2 * (3 + 4)])]
