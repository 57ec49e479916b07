"""Tokens by the part of the scores that they make up, beside a loop."""

import pytest
import torch
from torch import Tensor

from policies.mass import Mass
from src.kv.plan import Allotment
from tests.support.allotting import counts_of, random_scores


def naive(row: list[float], tau: float) -> int:
    stays = sum(s == float("inf") for s in row)
    rest = sorted((s for s in row if s != float("inf")), reverse=True)
    kept, mass = 0, 0.0
    while kept < len(rest) and (kept == 0 or mass < tau * sum(rest)):
        mass += rest[kept]
        kept += 1
    return stays + kept


@pytest.mark.parametrize("tau", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("a", [Allotment(12, 50, 2, 3, 4), Allotment(5, 5, 1, 1), Allotment(9, 40, 1, 2, 8)], ids=str)
def test_beside_a_loop(tau: float, a: Allotment) -> None:
    for seed in range(5):
        scores = [s.double() for s in random_scores(a, seed)]
        found = counts_of(Mass(tau), a, scores)
        assert found == [[naive(row, tau) for row in layer.tolist()] for layer in scores]
    assert not Mass(tau).exact


def test_by_hand() -> None:
    inf = torch.inf
    scores = torch.tensor([[1.0, 4.0, inf, 2.0, 1.0], [0.0, 0.0, inf, 0.0, 0.0], [1.0, 1.0, inf, 1.0, 1.0]])

    def counts(tau: float) -> list[int]:
        found: Tensor = Mass(tau).counts(scores)
        return [int(count) for count in found]

    assert counts(0.5) == [2, 2, 3] and counts(0.6) == [3, 2, 4] and counts(0.95) == [5, 2, 5]
    assert Mass(1).counts(torch.tensor([[3.0, 0.0, 1e-9, 0.0]])).tolist() == [2]
    assert Mass().counts(torch.full((2, 3), inf)).tolist() == [3, 3]


def test_told_the_budget_and_bad_settings() -> None:
    assert Mass().plan(Allotment(12, 50, 2, 3, 4)).told(1) == 12
    for tau in (0, 1.5):
        with pytest.raises(ValueError, match=rf"tau={tau}: valid: a number above 0, at most 1"):
            Mass(tau)
