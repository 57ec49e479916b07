"""The control policies against a naive computation, after the prompt and after every decoding step."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from policies.base import Policy
from policies.full import Full
from policies.h2o import H2O
from policies.oracle import Oracle
from policies.random import Random, priority
from policies.recent import Recent
from policies.tova import TOVA
from policies.vatp import VATP
from src.config.cells import grid, make_cell, policy_config
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from src.errors import InputError
from tests.policies.test_oracle import prompt, run
from tests.support import naive
from tests.support.naive import Kept, Naive, softmax, top
from tests.support.tiny import tiny

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

FULL = Variant(Full(), None)
STEPS = 24
CELLS: list[tuple[Policy, int]] = [
    (Recent(), 1),
    (Recent(), 17),
    (Random(window=0), 12),
    (Random(window=8), 17),
    (Random(window=8, seed=5), 17),
    (TOVA(), 1),
    (TOVA(), 9),
    (TOVA(), 17),
    (H2O(normalise="rows"), 17),
    (H2O(normalise="rows", heavy_share=0.8), 17),
    (H2O(normalise="expectation"), 17),
    (H2O(normalise="expectation", heavy_share=0.8), 17),
    (VATP(sinks=0), 17),
    (VATP(sinks=3), 17),
    (VATP(sinks=3, normalise="rows", heavy_share=0.8), 17),
    (VATP(), 42),
]


class NaiveControls(Naive):
    """The controls' formulas, in plain loops."""

    foreseen: Any = None  # oracle: [layer][KV head][position]

    def cut(self, layer: int, g: int, n: int) -> list[int]:
        policy, hint = self.policy, self.hint(0, layer, g)
        if isinstance(policy, Oracle):
            return top(dict(enumerate(self.foreseen[layer][g])), self.budget, hint)
        safe = [j for j in range(n) if self.safe(j)]
        scores = {j: self.score(layer, g, j) for j in range(n) if j not in safe}
        return safe + top(scores, self.budget - len(safe), hint)

    def drop(self, layer: int, g: int) -> int:
        there = [t.position for t in self.cached[layer][g]]
        scores = {j: self.score(layer, g, j) for j in there if not self.safe(j)}
        stay = top(scores, len(scores) - 1, self.hint(self.step, layer, g)) if len(scores) > 1 else []
        return next(j for j in scores if j not in stay)

    def safe(self, j: int) -> bool:
        policy, newest = self.policy, self.position
        if isinstance(policy, Random):
            return j > newest - policy.window
        if isinstance(policy, H2O):
            heavy = max(1, round(policy.heavy_share * self.budget))
            first = isinstance(policy, VATP) and j < policy.sinks
            return j > newest - (self.budget - min(heavy, self.budget - 1)) or first
        return False

    def score(self, layer: int, g: int, j: int) -> float:
        policy = self.policy
        if isinstance(policy, Recent):
            return j
        if isinstance(policy, Random):
            return hashed(policy.seed, layer, g, j)
        if isinstance(policy, TOVA):
            return sum(softmax(self.rows[layer][h][-1])[j] for h in range(self.heads)) / self.heads
        assert isinstance(policy, H2O)
        heads = range(g * self.group, (g + 1) * self.group)
        rows = [self.rows[layer][h][i] for h in heads for i in range(j, self.position + 1)]
        received = sum(self.weights(layer, h, i).get(j, 0.0) for h in heads for i in range(j, self.position + 1))
        if policy.normalise == "rows":
            received /= len(rows)
        elif policy.normalise == "expectation":
            received /= sum(1 / len(row) for row in rows)
        norm = sum(abs(x) for x in self.values[layer][g][j].tolist())
        return received * norm if isinstance(policy, VATP) else received


def hashed(seed: int, layer: int, head: int, position: int) -> float:
    """`policies.random.priority` in Python's own integers."""
    x = seed
    for part in (layer, head, position):
        x = (x + 0x9E3779B9 + part) % 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        x ^= x >> 16
    return x // 2 / 2**31 + position / 2**52


def check(model: Any, got: tuple[Generation, list[Kept]], foreseen: Any = None) -> None:
    generation, history = got
    request, variant = generation.request, generation.variant
    scope = request.context_tokens or len(request.ids)
    alone = NaiveControls(
        model, variant.policy, variant.cell(scope).budget, lambda step, layer, head: set(history[step][layer][head])
    )
    alone.foreseen = foreseen
    expected = alone.run(request.ids, request.max_new_tokens, request.context_tokens)
    assert len(history) == len(expected.kept)
    for step, (mine, theirs) in enumerate(zip(history, expected.kept, strict=True)):
        assert mine == theirs, f"kept positions differ after step {step}"
    assert generation.tokens == expected.tokens


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", torch.float64)


@pytest.fixture(scope="module")
def wave(llama: Any) -> dict[tuple[str, int], tuple]:
    requests = [Request(str(n), prompt(n, seed=n), frozenset(), STEPS + 1) for n in (56, 30, 9)]
    return run(llama, requests, [Variant(p, b) for p, b in CELLS])


@pytest.mark.parametrize("length", ["56", "30", "9"])
@pytest.mark.parametrize("cell", range(len(CELLS)), ids=lambda i: f"{CELLS[i]}")
def test_as_naive(llama: Any, wave: dict[tuple[str, int], tuple], cell: int, length: str) -> None:
    check(llama, wave[length, cell])


def test_the_wave_is_as_each_cell_alone(llama: Any, wave: dict[tuple[str, int], tuple]) -> None:
    for cell in (3, 6, 9, 13):
        together, history = wave["30", cell]
        ((alone, alone_history),) = run(llama, [together.request], [Variant(*CELLS[cell])]).values()
        assert (alone.tokens, alone_history) == (together.tokens, history)


def test_controls_read_the_question_through_the_cut_cache(llama: Any) -> None:
    request = Request("x", prompt(40), frozenset(), 6, context_tokens=28)
    for got in run(llama, [request], [Variant(p, b) for p, b in CELLS[:-1]]).values():
        check(llama, got)


# --- single policies ---


def test_random_is_uniform_and_its_heads_layers_and_seeds_differ() -> None:
    positions = torch.arange(4000).expand(2, -1)
    u = priority(0, 3, positions)
    assert u.min() >= 0 and u.max() < 1
    for head in u:
        counts = torch.histc(head.float(), 10, 0, 1)
        assert (counts - 400).abs().max() < 4 * math.sqrt(360)  # four standard deviations of a bin
        assert len(head.unique()) == 4000
    others = [u[1], priority(0, 4, positions)[0], priority(1, 3, positions)[0]]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([u[0], other]))[0, 1])) < 4 / math.sqrt(4000)
    neighbours = torch.stack([u[0, :-1], u[0, 1:]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 4 / math.sqrt(4000)


def test_random_is_at_every_moment_the_top_of_one_fixed_order(wave: Any) -> None:
    """A uniform sample of everything read so far; the incoming token has no privilege without a window."""
    _, history = wave["56", 2]  # no window, budget 12
    for step, kept in enumerate(history):
        for layer, heads in enumerate(kept):
            for head, positions in enumerate(heads):
                best = sorted(range(56 + step), key=lambda j, at=(layer, head): -hashed(0, *at, j))[:12]
                assert positions == sorted(best)


def test_tova_keeps_the_same_tokens_for_all_heads_and_may_turn_the_newest_away(wave: Any) -> None:
    refused = 0
    for cell in (5, 6, 7):
        _, history = wave["56", cell]
        for step, kept in enumerate(history):
            for heads in kept:
                assert all(positions == heads[0] for positions in heads)
                refused += 56 + step - 1 not in heads[0]
    assert refused > 10  # otherwise that branch was not tested


def test_normalised_sums_on_uniform_attention() -> None:
    """All logits 0: S_j = H_n - H_(j-1). Divided by its expectation it is flat; by its rows it still falls."""
    from tests.policies.test_policies import prompt as synthetic

    p = synthetic(n=50, scale=0.0)
    flat = H2O(normalise="expectation").score(p, 10)
    assert torch.allclose(flat, torch.ones_like(flat))
    mean = H2O(normalise="rows").score(p, 10)[0]
    harmonic = sum(1 / i for i in range(1, 51))
    assert float(mean[0]) == pytest.approx(harmonic / 50)
    assert float(mean[-1]) == pytest.approx(1 / 50)
    assert (mean.diff() < 0).all()  # the first-to-last ratio is H_n, about ln n, where the plain sum has n H_n
    plain = H2O().score(p, 10)[0]
    assert float(mean[0] / mean[-1]) == pytest.approx(harmonic)
    assert float(plain[0] / plain[-1]) == pytest.approx(50 * harmonic)


def test_vatp_is_h2o_times_the_value_norm_and_protects_the_first_tokens() -> None:
    from tests.policies.test_policies import prompt as synthetic

    p = synthetic()
    norms = p.values.abs().sum(-1)
    assert torch.allclose(VATP(sinks=0).score(p, 50), H2O().score(p, 50) * norms)
    assert torch.isinf(VATP().score(p, 50)[:, :20]).all()
    assert (VATP().keep_prompt(p, 50)[:, :20] == torch.arange(20)).all()
    assert VATP().least_budget() == 42  # half of it is 21, one more than are protected
    assert VATP(heavy_share=1.0).least_budget() == 22
    assert VATP(sinks=0).least_budget() == 2
    with pytest.raises(InputError, match="budget=41: VATP always keeps 41 tokens; valid: 42 or more"):
        Variant(VATP(), 41)
    with pytest.raises(ValueError, match="heavy_share=0"):
        VATP(heavy_share=0.0)


# --- the oracle ---


def answer_attention(model: Any, ids: list[int], scope: int, answer: list[int], group: str) -> list[list[list[float]]]:
    """[layer][KV head][position]: what every row after `scope` gives each position, from naive full attention."""
    reader = Naive(model, Full(), 0)
    reader.run([*ids, *answer[:-1]], 1)
    found = []
    for layer in range(reader.layers):
        rows = [[softmax(row) for row in head[scope:]] for head in reader.rows[layer]]
        sums = [[sum(row[j] for row in head) for j in range(scope)] for head in rows]
        joined = []
        for g in range(reader.kv_heads):
            mine = sums[g * reader.group : (g + 1) * reader.group]
            join = max if group == "max" else lambda x: sum(x) / len(x)
            joined.append([join(column) for column in zip(*mine, strict=True)])
        found.append(joined)
    return found


@pytest.mark.parametrize("context", [None, 25])
@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("answer", ["generated", "reference"])
def test_oracle(llama: Any, answer: Any, group: Any, context: int | None) -> None:
    reference = prompt(8, seed=7)
    request = Request("x", prompt(40), frozenset(), 10, context_tokens=context, reference=reference)
    variants = [FULL, Variant(Oracle(answer=answer, group=group), 12), Variant(TOVA(), 12)]
    results = run(llama, [request], variants)
    tokens = reference if answer == "reference" else results["x", 0][0].tokens
    foreseen = answer_attention(llama, request.ids, context or 40, tokens, group)
    check(llama, results["x", 1], foreseen)
    # It cuts once and then grows, and the others know nothing of it.
    assert all(layer.shape[1] == 12 for layer in results["x", 1][0].kept_prompt)
    assert all(layer.shape[1] == 12 + 9 + (40 - (context or 40)) for layer in results["x", 1][0].kept_end)
    check(llama, results["x", 2])
    alone = run(llama, [replace(request, reference=None)], [FULL])["x", 0][0]
    assert alone.tokens == results["x", 0][0].tokens


def test_oracle_generates_by_itself_when_the_full_cache_is_not_asked_for(llama: Any) -> None:
    request = Request("x", prompt(40), frozenset(), 10)
    with_full = run(llama, [request], [FULL, Variant(Oracle(), 12)])["x", 1]
    alone = run(llama, [request], [Variant(Oracle(), 12)])["x", 0]
    assert (alone[0].tokens, alone[1]) == (with_full[0].tokens, with_full[1])
    weighed = run(llama, [request], [Variant(Oracle(weigh_values=True), 12)])["x", 0]
    assert weighed[1] != alone[1]


def test_oracle_both_answers_in_one_wave(llama: Any) -> None:
    requests = [Request(str(n), prompt(n, seed=n), frozenset(), 8, reference=prompt(5, seed=n + 1)) for n in (40, 33)]
    kinds = [Oracle(), Oracle(answer="reference")]
    together = run(llama, requests, [Variant(p, 9) for p in kinds])
    for (name, index), (_, history) in together.items():
        request = next(r for r in requests if r.name == name)
        assert run(llama, [request], [Variant(kinds[index], 9)])[name, 0][1] == history
        assert history != together[name, 1 - index][1]


def test_an_answer_of_one_token_is_foreseen_by_the_row_that_predicted_it(llama: Any) -> None:
    request = Request("x", prompt(40), frozenset(), 1)
    generation, _ = run(llama, [request], [Variant(Oracle(), 12)])["x", 0]
    foreseen = answer_attention(llama, request.ids[:-1], 39, [request.ids[-1], 0], "mean")
    # The row of the last prompt token, over the tokens before it; it may keep itself, too.
    for layer, kept in zip(foreseen, generation.kept_prompt, strict=True):
        for scores, positions in zip(layer, kept.tolist(), strict=True):
            best = sorted(range(39), key=lambda j, s=scores: -s[j])
            assert set(positions) - {39} == set(best[: 12 - (39 in positions)])


def test_oracle_without_a_reference_is_refused(llama: Any) -> None:
    request = Request("qa/3", prompt(40), frozenset(), 4)
    with pytest.raises(InputError, match=r"answer=reference.*qa/3.* fidelity=true, or answer=generated"):
        list(Engine(llama).run([Job(request, [Variant(Oracle(answer="reference"), 12)])]))


def test_oracle_is_the_most_faithful(llama: Any) -> None:
    """Over many prompts, against every control with the same cache: the smallest KL to the full cache."""
    policies = [Oracle(answer="reference"), Random(window=0), Recent(), TOVA(), H2O(), VATP(sinks=0)]
    requests = [
        Request(str(n), prompt(64, seed=n), frozenset(), 1, reference=prompt(6, seed=99 + n)) for n in range(12)
    ]
    results = run(llama, requests, [Variant(p, 24) for p in policies])
    kl = [sum(results[str(n), i][0].fidelity["kl"] for n in range(12)) / 12 for i in range(len(policies))]
    assert kl[0] == min(kl), dict(zip(policies, kl, strict=True))


# --- configs ---


@pytest.mark.parametrize("name", ["random", "recent", "tova", "vatp", "oracle", "h2o"])
def test_every_control_has_a_config_with_its_defaults(name: str) -> None:
    cell = make_cell(policy_config(name), 64)
    assert cell.variant.policy == type(cell.variant.policy)()
    options = set(cell.settings) - {"name", "_target_"}
    assert options == set(vars(cell.variant.policy)) - {"allocate", "store", "read"}


def test_the_seed_of_a_sweep_reaches_random() -> None:
    assert grid(["random"], [64], seed=3)[0].settings["seed"] == 3
    assert grid([{"name": "random", "seed": 4}], [64], seed=3)[0].settings["seed"] == 4
    assert grid(["random"], [64])[0].variant.policy == Random()


def test_wrong_options_are_named() -> None:
    for spec, message in [
        ({"name": "h2o", "normalise": "mean"}, "normalise=mean: valid: none, rows, expectation"),
        ({"name": "oracle", "answer": "both"}, "answer=both: valid: generated, reference"),
        ({"name": "random", "window": -1}, "window=-1: valid: a whole number"),
    ]:
        with pytest.raises(InputError, match=message):
            make_cell(policy_config(spec), 64)
