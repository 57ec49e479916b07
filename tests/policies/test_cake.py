"""CAKE's score and its cascade, beside loops over the whole attention matrix."""

import math
import random
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.cake import CAKE, Cascade
from src.kv.plan import Allotment
from src.kv.prompt import PromptAttention
from tests.support.allotting import counts_of, prompt, prompts, random_scores


def rows_of(p: PromptAttention, rows: int) -> list[list[list[float]]]:
    """The last rows of the attention matrix, `[query head][row][column]`."""
    found = []
    for head in range(p.queries.shape[0]):
        keys = p.keys[head // p.group]
        found.append([])
        for i in range(p.length - rows, p.length):
            exps = [math.exp(float(p.queries[head, i] @ keys[j]) * p.scaling) for j in range(i + 1)]
            found[-1].append([e / sum(exps) for e in exps] + [0.0] * (p.length - i - 1))
    return found


def naive_score(p: PromptAttention, window: int, gamma: float, kernel: int) -> Tensor:
    old = p.length - window
    scores = torch.zeros(p.kv_heads, old, dtype=torch.float64)
    for head, rows in enumerate(rows_of(p, window)):
        columns = [[row[j] for row in rows] for j in range(old)]
        worth = [statistics.mean(c) + gamma * statistics.variance(c) for c in columns]
        for j in range(old):
            near = worth[max(0, j - kernel // 2) : j + kernel // 2 + 1]
            scores[head // p.group, j] += statistics.mean(near) / p.group
    return scores


def naive_preference(p: PromptAttention, window: int, tau1: float, tau2: float) -> float:
    old, spread, shift = p.length - window, 0.0, 0.0
    for rows in rows_of(p, window):
        for j in range(old):
            column = [row[j] for row in rows]
            spread -= sum(a * math.log(a + 1e-10) for a in column)
            shift += statistics.variance(column)
    return float(spread ** (1 / tau1) * shift ** (1 / tau2))


@pytest.mark.parametrize(("window", "gamma", "kernel"), [(4, 200.0, 5), (8, 0.0, 1), (2, 3.5, 3)])
def test_score(window: int, gamma: float, kernel: int) -> None:
    for n in (window + 1, 30):
        p = prompt(n)
        assert torch.allclose(CAKE(window, gamma, kernel).score(p, 20), naive_score(p, window, gamma, kernel))


def test_score_likes_what_varies() -> None:
    """Two tokens with much the same mean attention: the one that is looked at now and then is worth more."""
    weights = torch.full((1, 1, 4, 12), 1e-4)
    weights[..., 2] = 0.26
    weights[:, :, 1, 5] = 1.0

    class Given(PromptAttention):
        def window_weights(self, rows: int) -> Tensor:
            return weights

    p = prompt(12, kv_heads=1, group=1)
    given = Given(p.queries, p.keys, p.values, p.scaling, 0, 1)
    score = CAKE(4, 200.0, 1).score(given, 6)[0]
    assert score.argmax() == 5 and score.topk(2).indices.tolist() == [5, 2]
    assert CAKE(4, 0.0, 1).score(given, 6)[0].topk(2).indices.tolist() == [2, 5]


def test_keeps_its_window() -> None:
    kept = CAKE(window=4).keep_prompt(prompt(30), 10)
    assert kept.shape == (2, 10) and kept[:, -4:].tolist() == [[26, 27, 28, 29]] * 2


@pytest.mark.parametrize(("tau1", "tau2"), [(1.6, 0.4), (1, 1), (0.5, 2.3)])
def test_preference(tau1: float, tau2: float) -> None:
    for window, n in ((4, 20), (8, 9), (2, 30)):
        p = prompt(n, seed=3)
        wanted = naive_preference(p, window, tau1, tau2)
        assert Cascade(window, tau1, tau2).preference(p) == pytest.approx(wanted, rel=1e-9)


def test_preference_of_short_prompts_and_of_no_number() -> None:
    for n in (2, 3, 8):  # rows that are there, and one older token
        assert math.isfinite(Cascade(window=8).preference(prompt(n)))
    p = prompt(20)
    p.queries[:] = torch.nan
    assert Cascade(window=4).preference(p) == 0.0


def one_shot(preferences: list[float], a: Allotment) -> list[int]:
    """Of all layers at once, entry by entry: one at least, then to the largest preference per entry."""
    counts = [1] * a.layers
    while sum(counts) < (a.budget - a.always) * a.layers:
        open_ones = [layer for layer in range(a.layers) if counts[layer] < a.length - a.always]
        counts[max(open_ones, key=lambda layer: preferences[layer] / (counts[layer] + 0.5))] += 1
    return [a.always + count for count in counts]


def allotments(count: int) -> list[Allotment]:
    draw = random.Random(0)
    found = [Allotment(9, 40, 1, 1, 8), Allotment(9, 40, 5, 2, 8), Allotment(39, 40, 4, 1, 8)]
    while len(found) < count:
        always = draw.choice([0, 1, 4, 8])
        budget = always + draw.randint(1, 20)
        found.append(Allotment(budget, budget + draw.randint(1, 30), draw.randint(1, 8), draw.randint(1, 3), always))
    return found


@pytest.mark.parametrize("a", allotments(25), ids=str)
def test_the_cascade_ends_where_one_shot_would(a: Allotment) -> None:
    """And on the way it only shrinks and never holds more than the budget's (`counts_of` asserts both)."""
    cascade, seen = Cascade(window=6, tau1=1.0, tau2=0.7), prompts(a, group=1)
    found = counts_of(cascade, a, random_scores(a), seen)
    assert found == [[count] * a.kv_heads for count in one_shot([cascade.preference(p) for p in seen], a)]


def test_what_is_held_on_the_way() -> None:
    """Everything while there is room, then the budget of the whole model, and a layer's prompt on top for a moment."""
    a = Allotment(10, 60, 12, 2, 4)
    plan, held, most = Cascade(window=8).plan(a), dict[int, int](), 0
    for p, scores in zip(prompts(a), random_scores(a), strict=True):
        most = max(most, sum(held.values()) + a.length * a.kv_heads)
        held |= {layer: sum(counts) for layer, counts in plan.cut(p, scores).items()}
        seen = p.layer + 1  # windows of layers still to come are not given away
        room = (a.budget - a.always) * a.layers
        assert sum(held.values()) == a.kv_heads * (min(room, seen * (a.length - a.always)) + a.always * seen)
    assert most <= a.total + a.length * a.kv_heads


def test_earlier_layers_shrink_and_are_told_the_budget() -> None:
    a = Allotment(12, 60, 4, 2, 4)
    plan = Cascade(window=8).plan(a)
    assert [plan.told(layer) for layer in range(4)] == [12] * 4
    answers = [plan.cut(p, s) for p, s in zip(prompts(a), random_scores(a), strict=True)]
    assert answers[0] == {0: [4 + 32] * 2}  # all of the model's beside windows
    assert answers[1][0][0] < 4 + 32 and set(answers[1]) == {0, 1}


def test_layers_without_a_preference_share_alike() -> None:
    a = Allotment(12, 60, 4, 1, 4)
    seen = prompts(a, group=1)
    for p in seen:
        p.queries[:] = torch.nan
    assert counts_of(Cascade(window=8), a, random_scores(a), seen) == [[12]] * 4


@pytest.mark.parametrize("length", [1, 5, 12])
def test_a_short_prompt_is_kept_whole(length: int) -> None:
    a = Allotment(12, length, 3, 2, 4)
    assert counts_of(Cascade(window=8), a, [torch.zeros(2, length)] * 3) == [[length] * 2] * 3


def test_bad_settings() -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (CAKE, {"window": 1}, "window=1, kernel=5: valid: a window of 2 or more, an odd kernel"),
        (CAKE, {"kernel": 4}, "window=32, kernel=4: valid"),
        (CAKE, {"gamma": -1.0}, "gamma=-1.0: valid: a number, 0 or more"),
        (Cascade, {"window": 1}, "window=1, tau1=1.6, tau2=0.4: valid: a window of 2 or more, tau above 0"),
        (Cascade, {"tau2": 0}, "tau2=0: valid"),
        (Cascade, {"tau1": "high"}, "tau1=high: valid: a number"),
    ]
    for kind, settings, said in wrong:
        with pytest.raises(ValueError, match=said):
            kind(**settings)
    with pytest.raises(ValueError, match=r"budget=8: layer 0.* valid: 9 or more"):
        Cascade().plan(Allotment(8, 100, 2, 2, 8))
