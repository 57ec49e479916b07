"""SCOPE against naive lists over 600 steps, what must hold at every step, and its budgets."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from policies.ahakv import AhaKV
from policies.full import Full
from policies.h2o import H2O
from policies.scope import PROMPT_POLICIES, Scope
from policies.snapkv import SnapKV
from policies.streaming_llm import StreamingLLM
from src.config.cells import make_cell
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from src.errors import InputError
from src.kv.budget import SplitBudget, parse_budget
from tests.support import naive
from tests.support.naive import Kept, Naive, Token, softmax, top
from tests.support.tiny import tiny, tokens
from tests.support.watch import Watch, sort

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

STEPS = 620
PROMPT, ALPHA, BETA = 40, 16, 24
STRATEGIES = ("slide", "adaptive", "discontinuous")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", torch.float64, num_hidden_layers=2)


def run(model: Any, variants: Sequence[Variant], new: int = STEPS + 1, n: int = PROMPT, **more: Any) -> list[tuple]:
    watch = Watch()
    request = Request("x", tokens(n)[0].tolist(), frozenset(), new, **more)
    results = Engine(model, 1000, [watch]).run([Job(request, variants)])
    return [(g, watch.kept[g]) for g in sorted(results, key=lambda g: variants.index(g.variant))]


def allowed(strategy: str, x: int, horizon: int, local: int, history: int) -> int:
    """The paper's size of the decode pool after x output tokens, written down once more."""
    if x <= local or strategy == "slide":
        return min(x, local + history)
    return min(x, local + ((x - local) * history) // (horizon - local))


class NaiveScope(Naive):
    """Lists: the prompt pool once, then one token appended and the decode pool cut by the paper's rules."""

    def __init__(
        self, model: Any, policy: Scope, alpha: int, local: int, history: int, horizon: int, hint: Any
    ) -> None:
        super().__init__(model, policy, alpha, hint)
        self.local, self.history, self.horizon = local, history, horizon
        self.sums: dict[tuple[int, int], dict[int, float]] = {}
        self.selections = 0
        self.n = 0

    def cut(self, layer: int, g: int, n: int) -> list[int]:
        """H2O over all rows, and the last alpha2."""
        self.n = n
        recent = 8
        scores = {j: self.score(layer, g, j) for j in range(n - recent)}
        return top(scores, self.budget - recent, self.hint(0, layer, g)) + list(range(n - recent, n))

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = q.new_zeros(1, self.heads, v.shape[-1])
        x = self.position - self.n + 1
        for g in range(self.kv_heads):
            cached = self.cached[layer][g]
            cached.append(Token(self.position, k[g, 0], v[g, 0]))
            keys, values = torch.stack([t.key for t in cached]), torch.stack([t.value for t in cached])
            rows = []
            for h in range(g * self.group, (g + 1) * self.group):
                logits = (keys @ q[h, 0] * scale).tolist()
                row = softmax(dict(zip([t.position for t in cached], logits, strict=True)))
                out[0, h] = torch.tensor(list(row.values()), dtype=v.dtype) @ values
                rows.append(row)
            current = {t.position: sum(row[t.position] for row in rows) / len(rows) for t in cached}
            sums = self.sums.setdefault((layer, g), {})
            for j, weight in current.items():
                sums[j] = sums.get(j, 0.0) + weight
            scores = sums if self.policy.score == "cumulative" else current
            stay = self.pool(x, [j for j in current if j >= self.n], scores, self.hint(self.step, layer, g))
            self.cached[layer][g] = [t for t in cached if t.position < self.n or t.position in stay]
            self.sums[layer, g] = {t.position: sums[t.position] for t in self.cached[layer][g]}
        return out

    def pool(self, x: int, there: list[int], scores: dict[int, float], hint: set[int]) -> set[int]:
        size = allowed(self.policy.strategy, x, self.horizon, self.local, self.history)
        if self.policy.strategy == "discontinuous":
            rising = size > allowed("discontinuous", x - 1, self.horizon, self.local, self.history)
            if not rising or x <= self.local:
                return set(there)
            self.selections += 1
        if len(there) <= size:
            return set(there)
        recent = {j for j in there if j > self.position - self.local}
        older = {j: scores[j] for j in there if j not in recent}
        return recent | set(top(older, size - len(recent), hint))


CASES = [(strategy, "cumulative", 6.0) for strategy in STRATEGIES] + [
    (strategy, "current", 0.5) for strategy in STRATEGIES
]


@pytest.fixture(scope="module")
def long(model: Any) -> dict[tuple[str, str, float], tuple[Generation, list[Kept]]]:
    policies = [Scope(strategy=s, score=c, decode_local=b) for s, c, b in CASES]
    return dict(zip(CASES, run(model, [Variant(p, SplitBudget(ALPHA, BETA)) for p in policies]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equations_over_600_steps(model: Any, long: dict[Any, tuple], case: tuple[str, str, float]) -> None:
    generation, history = long[case]
    local = 12 if case[2] == 0.5 else 6
    policy = generation.variant.policy
    alone = NaiveScope(
        model,
        policy,
        ALPHA,
        local,
        BETA - local,
        STEPS + 1,
        lambda step, layer, head: set(history[step][layer][head]),
    )
    expected = alone.run(generation.request.ids, STEPS + 1)
    for step, (mine, theirs) in enumerate(zip(history, expected.kept, strict=True)):
        assert mine == theirs, f"kept positions differ after step {step}"
    assert generation.tokens == expected.tokens
    if case[0] == "discontinuous":  # per layer and head
        assert alone.selections <= (BETA - local) * 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_holds_at_every_step(long: dict[Any, tuple], case: tuple[str, str, float]) -> None:
    generation, history = long[case]
    local = 12 if case[2] == 0.5 else 6
    beta1, horizon = BETA - local, STEPS + 1
    pause = -(-(horizon - local) // beta1)
    pools, selections, largest = [], 0, 0
    for x, kept in enumerate(history):
        sizes = set()
        for layer, now in enumerate(kept):
            for head, positions in enumerate(now):
                prompt = [p for p in positions if p < PROMPT]
                assert prompt == history[0][layer][head] and len(prompt) == ALPHA
                output = [p for p in positions if p >= PROMPT]
                assert output[-min(local, x) :] == list(range(PROMPT, PROMPT + x))[-min(local, x) :]
                sizes.add(len(output))
        assert len(sizes) == 1  # all layers and heads alike
        pools.append(sizes.pop())
        size = allowed(case[0], x, horizon, local, beta1)
        if case[0] != "discontinuous":
            assert pools[x] == size
        elif x and pools[x] <= pools[x - 1]:
            selections += 1
            assert pools[x] == size
        elif x:
            assert pools[x] == pools[x - 1] + 1
        largest = max(largest, pools[x])
    assert selections <= beta1
    most = BETA if case[0] != "discontinuous" else BETA + pause - 1
    assert BETA - 1 <= largest <= most  # the schedule reaches its full size with the last token, which is never fed
    entry = 2 * 16 * 8 * 2 * 2  # keys and values, head_dim, bytes, KV heads, layers
    assert generation.kv_bytes == ALPHA * entry
    assert generation.kv_bytes_peak == (ALPHA + largest) * entry


def test_the_formula() -> None:
    """The paper's 4K setting: beta1 + beta2 = 512, beta2 = 256, T = 4,096, so one more entry every 15 tokens."""
    policy = Scope(strategy="adaptive", decode_local=256).at(512, 4096)
    assert (policy.local, policy.history) == (256, 256)
    assert [policy.size(x) for x in (0, 1, 256, 257, 270, 271, 272, 4095, 4096)] == [
        *(0, 1, 256, 256, 256, 257, 257),
        *(511, 512),
    ]
    for x in range(257, 4097):
        assert policy.size(x) == 256 + int((x - 256) * 256 / (4096 - 256))
    # A schedule with room for everything drops nothing.
    roomy = Scope(strategy="discontinuous").at(512, 300)
    assert [roomy.size(x) for x in (1, 255, 299)] == [1, 255, 299]


def test_any_policy_chooses_the_prompt_pool(model: Any) -> None:
    """What the prompt policy keeps on its own is the prompt pool, whichever it is."""
    budget = 36
    alone = {
        "h2o": H2O(heavy_share=1 - 8 / budget),
        "snapkv": SnapKV(window=8),
        "streaming_llm": StreamingLLM(),
        "full": Full(),
        "ahakv": AhaKV(),
    }
    assert set(alone) == set(PROMPT_POLICIES)
    own = SnapKV(window=4, kernel=1)
    variants = [Variant(Scope(prompt=name), SplitBudget(budget, 8)) for name in alone]
    variants += [Variant(policy, budget) for policy in alone.values()]
    variants += [Variant(Scope(prompt=own), SplitBudget(budget, 8)), Variant(own, budget)]
    results = run(model, variants, new=30, n=60)
    for i in range(len(alone)):
        history, theirs = results[i][1], results[i + len(alone)][1]
        assert history[0] == theirs[0], variants[i]
        assert [[p for p in head if p < 60] for layer in history[-1] for head in layer] == [
            head for layer in theirs[0] for head in layer
        ]
    assert results[-2][1][0] == results[-1][1][0]


def test_prompts_shorter_than_the_pool_and_questions_after_the_cut(model: Any) -> None:
    variants = [Variant(Scope(strategy=s), SplitBudget(ALPHA, 6)) for s in STRATEGIES]
    for _, history in run(model, variants, new=40, n=10):
        assert history[0] == [[list(range(10))] * 2] * 2
        assert all(head[:10] == list(range(10)) for layer in history[-1] for head in layer)
        assert max(len(head) for kept in history for layer in kept for head in layer) <= 10 + 6 + 12
    for generation, history in run(model, variants, new=40, n=50, context_tokens=30):
        assert len(history) == 20 + 40
        size = allowed(generation.variant.policy.strategy, 59, 60, 3, 3)
        output = [p for p in history[-1][0][0] if p >= 30]
        assert len(output) >= size and output[-3:] == [86, 87, 88]


def test_requests_with_other_lengths_share_a_wave(model: Any) -> None:
    """Lanes of one policy with their own T, decoded together, do what they do alone."""
    variants = [Variant(Scope(strategy=s), 20) for s in STRATEGIES] + [Variant(H2O(), 20)]
    requests = [Request(str(n), tokens(n, seed=n)[0].tolist(), frozenset(), n) for n in (30, 45, 60)]
    together = {(g.request, g.variant): g for g in Engine(model, 100).run([Job(r, variants) for r in requests])}
    for request in requests:
        for variant in variants:
            alone = next(Engine(model, 1).run([Job(request, [variant])]))
            other = together[request, variant]
            assert alone.tokens == other.tokens and alone.kv_bytes_peak == other.kv_bytes_peak
            assert [sort(a) for a in alone.kept_end] == [sort(b) for b in other.kept_end]


def test_budgets_in_one_number_and_in_two() -> None:
    cell = Variant(Scope(), 320).cell(1000, 100)
    assert (cell.budget, cell.policy.decode, cell.policy.horizon) == (256, 64, 100)  # type: ignore[attr-defined]
    cell = Variant(Scope(), SplitBudget(0.5, 64)).cell(1000, 100)
    assert (cell.budget, cell.policy.decode) == (500, 64)  # type: ignore[attr-defined]
    cell = Variant(Scope(decode_share=0.5), 0.1).cell(1000, 100)
    assert (cell.budget, cell.policy.decode) == (50, 50)  # type: ignore[attr-defined]
    assert parse_budget(OmegaConf.create({"prompt": 256, "decode": 64})) == SplitBudget(256, 64)
    node = OmegaConf.create({"name": "scope", "_target_": "policies.scope.Scope"})
    made = make_cell(node, SplitBudget(256, 64))
    assert (made.budget, made.budget_name, made.settings["decode_budget"]) == (320, "256+64", 64)
    assert make_cell(node, SplitBudget(0.25, 64)).budget_name == "0.25+64"


@pytest.mark.parametrize(
    ("policy", "budget", "names"),
    [
        (H2O(), SplitBudget(100, 20), "H2O has no decode phase"),
        (Scope(), SplitBudget(8, 20), "budget.prompt=8"),
        (Scope(prompt="ahakv"), SplitBudget(32, 20), "budget.prompt=32"),
        (Scope(decode_local=32), SplitBudget(100, 32), "budget.decode=32"),
        (Scope(), SplitBudget(100, 1), "budget.decode=1"),
        (Scope(decode_local=256), 512, "its decode part=102"),
    ],
)
def test_refused_budgets(policy: Any, budget: Any, names: str) -> None:
    with pytest.raises(InputError, match=names):
        Variant(policy, budget)


@pytest.mark.parametrize(
    "settings",
    [{"prompt": "h20"}, {"strategy": "glide"}, {"decode_local": 1.5}, {"decode_share": 1.0}, {"prompt_local": 0}],
)
def test_refused_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*valid: "):
        Scope(**settings)


def test_refused_mapping() -> None:
    with pytest.raises(InputError, match="two parts"):
        parse_budget({"prompt": 100})
