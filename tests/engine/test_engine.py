"""The engine: exactness against transformers, budgets, stops, bad input, and no state left behind."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

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
from src.engine.probes import LaneView, Probe
from src.engine.request import Generation, Job, Request, Variant
from src.errors import InputError
from src.kv.cache import LayerCache
from src.kv.faults import is_out_of_memory
from src.kv.prompt import PromptAttention
from tests.support import naive
from tests.support.hungry import HungryLater
from tests.support.tiny import SUPPORTED, tiny, tokens
from tests.support.watch import Watch

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

FULL = Variant(Full(), None)
EVICTING = [StreamingLLM(), StreamingLLM(positions="original"), H2O(), AhaKV(window=8), AhaKV(window=8, score_pool=7)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(length, seed=seed)[0].tolist()


def ask(name: str, length: int, new: int = 8, seed: int = 0, **more: Any) -> Request:
    return Request(name, prompt(length, seed), more.pop("stop_ids", frozenset()), new, **more)


def run(model: Any, request: Request, *variants: Variant) -> list[Generation]:
    """Of one request, in the order of the variants."""
    found = {g.variant: g for g in Engine(model, 100).run([Job(request, variants)])}
    return [found[variant] for variant in variants]


# Exact.


@pytest.mark.parametrize("arch", SUPPORTED)
def test_full_cache_is_greedy_generate(arch: str) -> None:
    model = tiny(arch)
    lengths = (1, 2, 40, 90)
    expected = {}
    for n in lengths:
        out = model.generate(torch.tensor([prompt(n, seed=n)]), max_new_tokens=80, do_sample=False)
        expected[str(n)] = out[0, n:].tolist()
    jobs = [Job(ask(str(n), n, 80, seed=n), [FULL, Variant(H2O(), 16)]) for n in lengths]
    for generation in Engine(model, 100).run(jobs):
        if generation.variant is FULL:
            assert generation.tokens == expected[generation.request.name]
            assert generation.finish == "length"


def test_a_budget_above_everything_is_the_full_cache(model: Any) -> None:
    request = ask("x", 60, 20)
    full, *others = run(model, request, FULL, *(Variant(p, 100) for p in (*EVICTING, SnapKV(window=8))))
    for generation in others:
        assert generation.tokens == full.tokens
        for mine, theirs in zip(generation.kept_end, full.kept_end, strict=True):
            assert torch.equal(mine.sort(dim=-1).values, theirs)


def test_two_runs_are_identical_and_leave_nothing_on_the_model(model: Any) -> None:
    jobs = [Job(ask(str(n), n, 12, seed=n), [FULL, *(Variant(p, 20) for p in EVICTING)]) for n in (50, 33, 9)]
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def outcome(engine: Engine) -> list[object]:
        return [(g.request.name, g.variant, g.tokens, [k.tolist() for k in g.kept_end]) for g in engine.run(jobs)]

    engine = Engine(model, 100)
    first = outcome(engine)
    assert outcome(engine) == first  # the same engine again
    assert outcome(Engine(model, 100)) == first
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: attributes.keys() for name, attributes in before.items()
    }


def test_inference_mode_does_not_leak_to_the_caller(model: Any) -> None:
    for _ in Engine(model).run([Job(ask("x", 10, 2), [FULL, Variant(H2O(), 8)])]):
        assert not torch.is_inference_mode_enabled()


def test_bfloat16_runs(model: Any) -> None:
    low = tiny("llama", torch.bfloat16)
    variants = [FULL, *(Variant(p, 20) for p in EVICTING), Variant(SnapKV(window=8), 20)]
    for generation in run(low, ask("x", 40, 8), *variants):
        assert len(generation.tokens) == 8
        if generation.variant.policy.evicts_while_decoding:
            assert generation.kv_bytes == 2 * 2 * 2 * 20 * 16 * 2


# Budget and memory.


@pytest.mark.parametrize("policy", EVICTING, ids=repr)
def test_budget_is_never_exceeded_and_bytes_are_exact(model: Any, policy: Policy) -> None:
    config = model.config

    def within_limit(lane: LaneView) -> None:
        for cache in lane.caches:
            assert cache.limit is not None and cache.slots <= cache.limit
            assert max(cache.used) <= cache.limit
            assert cache.keys.untyped_storage().nbytes() == cache.keys.numel() * 4
            held = cache.positions.sort(dim=-1).values
            assert (held[..., 1:] > held[..., :-1])[held[..., :-1] >= 0].all()  # no token twice

    budget, new = 23, 40
    watch = Watch(within_limit)
    engine = Engine(model, 100, [watch])
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * budget * config.head_dim * 4
    for length in (70, 24, 23):
        (generation,) = engine.run([Job(ask("x", length, new), [Variant(policy, budget)])])
        assert generation.kv_bytes == generation.kv_bytes_peak == expected
        assert generation.kv_bytes_full == expected // budget * length
        assert all(kept.shape == (config.num_key_value_heads, budget) for kept in generation.kept_end)
    (short,) = engine.run([Job(ask("x", 9, new), [Variant(policy, budget)])])
    assert (short.kv_bytes, short.kv_bytes_peak) == (expected // budget * 9, expected)
    assert watch.steps == 4 * (new - 1)


def test_a_growing_cache_reports_its_peak(model: Any) -> None:
    full, snap = run(model, ask("x", 50, 21), FULL, Variant(SnapKV(window=8), 20))
    entry = full.kv_bytes // 50
    assert full.kv_bytes == full.kv_bytes_full
    assert full.kv_bytes_peak == 70 * entry  # the last token is generated, not cached
    assert (snap.kv_bytes, snap.kv_bytes_peak) == (20 * entry, 40 * entry)


def test_bookkeeping_is_counted_apart(model: Any) -> None:
    layers, heads, budget, window = 2, 2, 20, 8
    h2o, stream, aha = run(
        model, ask("x", 50), Variant(H2O(), budget), Variant(StreamingLLM(), budget), Variant(AhaKV(window=8), budget)
    )
    entries = layers * heads * budget
    assert stream.bookkeeping_bytes == entries * 4  # positions
    assert h2o.bookkeeping_bytes == entries * (4 + 4)  # and a score
    small = layers * (8 + heads * 2 * 4)  # the prompt's length, a factor per query head
    assert aha.bookkeeping_bytes == entries * (4 + 4 + 4 * window + 3 * 4) + small


def test_kept_positions_after_the_prompt_survive_decoding(model: Any) -> None:
    """Alone, a full cache is decoded in place; what was kept after the prompt must not change with it."""
    for policy in EVICTING:
        (short,) = run(model, ask("x", 50, 1), Variant(policy, 20))
        (long,) = run(model, ask("x", 50, 30), Variant(policy, 20))
        for before, after in zip(short.kept_prompt, long.kept_prompt, strict=True):
            assert torch.equal(before, after)
            assert after.max() < 50


def test_fractions_of_the_prompt(model: Any) -> None:
    half, least, whole = run(
        model, ask("x", 51), Variant(H2O(), 0.5), Variant(AhaKV(window=8), 0.01), Variant(H2O(), 1.0)
    )
    assert [g.kept_end[0].shape[1] for g in (half, least, whole)] == [26, 9, 51]


@pytest.mark.parametrize(
    ("policy", "budget", "said"),
    [
        (AhaKV(), 32, "33"),
        (AhaKV(sinks=4), 36, "37"),
        (SnapKV(), 20, "33"),
        (StreamingLLM(), 4, "5"),
        (H2O(), 1, "2"),
        (H2O(), 0, "(0, 1]"),
        (H2O(), -0.5, "(0, 1]"),
        (H2O(), 1.5, "(0, 1]"),
        (H2O(), None, "(0, 1]"),
    ],
)
def test_a_budget_that_cannot_work_is_refused(policy: Policy, budget: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        Variant(policy, budget)
    message = str(error.value)
    assert f"budget={budget}" in message and said in message and "valid" in message and "\n" not in message


# Ends.


def test_stop_tokens_and_reasons(model: Any) -> None:
    (free,) = run(model, ask("x", 40, 30), FULL)
    stop = free.tokens[12]
    first = free.tokens.index(stop)
    (stopped,) = run(model, ask("x", 40, 30, stop_ids=frozenset({stop, 999})), FULL)
    assert stopped.tokens == free.tokens[: first + 1]
    assert (free.finish, stopped.finish) == ("length", "stop")
    (at_once,) = run(model, ask("x", 40, 30, stop_ids=frozenset({free.tokens[0]})), FULL)
    assert (at_once.tokens, at_once.finish) == (free.tokens[:1], "stop")
    assert [k.shape[1] for k in at_once.kept_end] == [40, 40]
    (one,) = run(model, ask("x", 40, 1), FULL)
    assert (one.tokens, one.finish) == (free.tokens[:1], "length")


def test_min_new_tokens_is_that_of_generate(model: Any) -> None:
    (free,) = run(model, ask("x", 40, 30), FULL)
    stops = frozenset(free.tokens[:9])
    (generation,) = run(model, ask("x", 40, 30, stop_ids=stops, min_new_tokens=11), FULL)
    model.set_attn_implementation("sdpa")
    expected = model.generate(
        tokens(40), max_new_tokens=30, min_new_tokens=11, do_sample=False, eos_token_id=sorted(stops)
    )[0, 40:]
    assert generation.tokens == expected.tolist()
    assert not stops & set(generation.tokens[:11])


def test_lanes_that_leave_early_change_nothing_for_the_others(model: Any) -> None:
    variants = [FULL, *(Variant(p, 20) for p in EVICTING), Variant(SnapKV(window=8), 20)]
    requests = [ask(str(i), n, new, seed=i) for i, (n, new) in enumerate([(40, 3), (12, 25), (60, 14), (30, 1)])]
    seen = []
    for generation in Engine(model, 100).run([Job(request, variants) for request in requests]):
        seen.append(generation.request.name)
        (alone,) = run(model, generation.request, generation.variant)
        assert generation.tokens == alone.tokens
        assert [k.tolist() for k in generation.kept_end] == [k.tolist() for k in alone.kept_end]
        assert generation.kv_bytes_peak == alone.kv_bytes_peak
        assert generation.lanes == len(requests) * len(variants)
    assert seen == [name for name in "3021" for _ in variants]  # each as soon as it has finished


def test_waves_hold_at_most_max_lanes(model: Any) -> None:
    jobs = [Job(ask(str(i), 10 + i, 3), [FULL, Variant(H2O(), 8)]) for i in range(5)]
    assert [g.lanes for g in Engine(model, 4).run(iter(jobs))] == [4] * 8 + [2] * 2
    assert [g.lanes for g in Engine(model, 1).run(iter(jobs))] == [2] * 10  # a prompt's lanes stay together


# Memory runs out.


@dataclass(frozen=True)
class Hungry(H2O):
    """Runs out of memory on some prompts."""

    longest: int = 0
    fails: type[RuntimeError] = torch.OutOfMemoryError
    message: str = "CUDA out of memory. Tried to allocate 2 GiB.\nmore"

    def keep_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        if prompt.length > self.longest:
            raise self.fails(self.message)
        return super().keep_prompt(prompt, budget)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_costs_only_the_sample_that_is_too_large(model: Any, kind: type[RuntimeError]) -> None:
    message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nmore"
    hungry = Variant(Hungry(longest=30, fails=kind, message=message), 12)
    jobs = [Job(ask(str(n), n, 6, seed=n), [Variant(H2O(), 12), hungry]) for n in (20, 25, 40, 22)]
    results = list(Engine(model, 100).run(jobs))
    assert len(results) == 8
    assert len({(g.request.name, g.variant) for g in results}) == 8
    for generation in results:
        if generation.request.name == "40" and generation.variant == hungry:
            assert generation.error is not None and generation.error.startswith("out of memory: ")
            assert "\n" not in generation.error and generation.tokens == []
        else:
            (alone,) = run(model, generation.request, Variant(H2O(), 12))
            assert (generation.error, generation.tokens) == (None, alone.tokens)


def test_out_of_memory_while_decoding_halves_the_wave_and_repeats_nothing_that_is_done(model: Any) -> None:
    jobs = [Job(ask(str(i), 20, new, seed=i), [Variant(HungryLater(), 12)]) for i, new in enumerate([9, 2, 9, 9])]
    results = list(Engine(model, 100).run(jobs))
    assert sorted(g.request.name for g in results) == ["0", "1", "2", "3"]
    assert [g.lanes for g in results] == [4, 1, 1, 1]
    for generation in results:
        (alone,) = run(model, generation.request, Variant(H2O(), 12))
        assert (generation.error, generation.tokens) == (None, alone.tokens)


@dataclass(frozen=True)
class HungryTogether(H2O):
    """Runs out of memory while decoding more than two lanes, and counts how often."""

    failures: ClassVar[list[int]] = []

    def observe(self, step: Any, state: Any) -> None:
        if step.logits.shape[0] > 2:
            self.failures.append(step.logits.shape[0])
            raise torch.OutOfMemoryError("out of memory")
        super().observe(step, state)


def test_waves_stay_narrow_after_memory_ran_out(model: Any) -> None:
    HungryTogether.failures.clear()
    jobs = [Job(ask(str(i), 20, 4, seed=i), [Variant(HungryTogether(), 12)]) for i in range(12)]
    results = list(Engine(model, 4).run(jobs))
    assert HungryTogether.failures == [4]  # not once for every wave of four
    assert [g.lanes for g in results] == [2] * 12 and not any(g.error for g in results)


def test_waves_widen_again_after_one_long_prompt(model: Any) -> None:
    hungry = Variant(Hungry(longest=30), 12)
    jobs = [Job(ask(str(i), 40 if i == 1 else 20, 4, seed=i), [hungry]) for i in range(160)]
    results = {g.request.name: g for g in Engine(model, 16).run(jobs)}
    assert [name for name, g in results.items() if g.error] == ["1"]
    lanes = [results[str(i)].lanes for i in range(160) if i != 1]
    assert min(lanes) < 8 <= lanes[20] < 16 and max(lanes[100:]) == 16


def test_what_is_under_way_is_finished_though_memory_ran_out_and_ctrl_c_came(model: Any) -> None:
    pressed: list[int] = []

    class Press(Probe):
        def on_cut(self, generation: Generation) -> None:
            if generation.request.name == "1":
                pressed.append(1)

    jobs = [Job(ask(str(i), 20, 6, seed=i), [Variant(HungryLater(), 12)]) for i in range(4)]
    results = list(Engine(model, 4, [Press()]).run(jobs, stop=lambda: bool(pressed)))
    assert sorted(g.request.name for g in results) == ["0", "1"] and not any(g.error for g in results)


@pytest.mark.parametrize("policy", [Hungry(longest=30), HungryLater()], ids=["prefill", "decoding"])
def test_nothing_of_the_failed_wave_is_alive_when_it_is_tried_again(
    model: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def caches() -> int:
        return sum(type(thing) is LayerCache for thing in gc.get_objects())

    engine, alive = Engine(model, 100), []
    before = caches()
    monkeypatch.setattr(engine.memory, "release", lambda: alive.append(caches() - before))
    jobs = [Job(ask(str(n), n, 6), [FULL, Variant(policy, 12), Variant(policy, 14)]) for n in (20, 40)]
    list(engine.run(jobs))
    assert alive and set(alive) == {0}

    def no_room(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("src.engine.pool.Pool.__init__", no_room)  # the prompts fit, stacking their lanes does not
    alive.clear()
    assert all(g.error for g in engine.run([Job(ask("x", 20), [FULL, Variant(H2O(), 12)])]))
    assert len(alive) == 3 and set(alive) == {0}


def test_other_errors_are_not_taken_for_memory(model: Any) -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    for message in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):
        assert is_out_of_memory(RuntimeError(message))
    broken = Variant(Hungry(fails=RuntimeError, message="shape mismatch"), 12)
    (result,) = run(model, ask("x", 20), broken)
    assert result.error is not None and "raised RuntimeError: shape mismatch (layer 0, test_engine.py:" in result.error


# Bad input.


def refusal(results: Iterator[Generation]) -> str:
    with pytest.raises(InputError) as error:
        list(results)
    message = str(error.value)
    assert "\n" not in message and "valid" in message
    return message


@pytest.mark.parametrize(
    ("weight", "blamed"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "layer 1"),
        ("model.layers.0.self_attn.v_proj.weight", "layer 0"),
        ("model.layers.0.mlp.down_proj.weight", "layer 1"),
        ("lm_head.weight", "what follows the last layer"),
    ],
)
@pytest.mark.parametrize("policy", [Full(), H2O(), AhaKV(window=8)], ids=lambda p: type(p).__name__)
def test_nan_names_the_sample_and_the_layer(weight: str, blamed: str, policy: Policy) -> None:
    model = tiny("llama")
    model.get_parameter(weight)[0, 0] = torch.nan
    message = refusal(Engine(model).run([Job(ask("trec/17", 30), [Variant(policy, 12)])]))
    assert "trec/17" in message and blamed in message and "the prompt" in message


def test_nan_while_decoding_names_the_sample() -> None:
    """Only one token's embedding is broken, and only one sample generates that token."""
    model = tiny("llama")
    requests = [ask(str(i), 30, 12, seed=i) for i in range(3)]
    outcomes = [run(model, request, FULL)[0].tokens for request in requests]
    bad = next(
        t for t in outcomes[1][:-1] if t not in {*outcomes[0], *outcomes[2], *(i for r in requests for i in r.ids)}
    )
    model.get_input_embeddings().weight[bad] = torch.nan
    message = refusal(Engine(model).run([Job(request, [FULL, Variant(H2O(), 40)]) for request in requests]))
    assert "sample 1" in message and "layer 0" in message
    assert f"position {30 + outcomes[1].index(bad)}" in message


def test_an_empty_prompt_is_refused(model: Any) -> None:
    message = refusal(Engine(model).run([Job(Request("empty one", [], frozenset(), 4), [FULL])]))
    assert "empty one" in message


def test_capped_logits_are_refused() -> None:
    with pytest.raises(InputError, match=r"gemma2 caps its attention logits .*softcapping"):
        Engine(tiny("gemma2"))


def test_a_sliding_window_is_honoured_or_refused() -> None:
    model = tiny("mistral", sliding_window=32)
    model.set_attn_implementation("sdpa")
    expected = model.generate(tokens(20), max_new_tokens=13, do_sample=False)[0, 20:].tolist()
    assert run(model, ask("fits", 20, 13), FULL)[0].tokens == expected  # the last token is not read
    assert "sliding_window=32" in refusal(Engine(model).run([Job(ask("grows", 20, 14), [FULL])]))
    assert "sliding_window=32" in refusal(Engine(model).run([Job(ask("long", 33, 1), [FULL])]))


def test_attention_without_lanes_is_refused(model: Any) -> None:
    Engine(model)
    with pytest.raises(InputError, match="lanes"):
        model(tokens(4))
    model.set_attn_implementation("sdpa")
