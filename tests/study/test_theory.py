"""The synthetic checks of the theory, against numbers worked out by hand and those quoted for the papers."""

import math

import numpy as np
import pytest

from src.retention.measures import expected_accumulation
from src.study.theory import accumulated, expected_with_sinks, row_entropy, slope_on_log


def test_equal_logits_give_the_harmonic_numbers_exactly() -> None:
    """n = 4, rows 1; 1/2 1/2; 1/3 ..; 1/4 ..: S = 25/12, 13/12, 7/12, 1/4."""
    (sums,) = accumulated(4, draws=1, scale=0.0)
    assert sums == pytest.approx([25 / 12, 13 / 12, 7 / 12, 1 / 4])
    assert expected_accumulation(4) == pytest.approx([25 / 12, 13 / 12, 7 / 12, 1 / 4])


def test_a_sink_by_hand() -> None:
    """Weight 3, n = 3: rows 1; 3/4 1/4; 3/5 1/5 1/5."""
    by_hand = [1 + 3 / 4 + 3 / 5, 1 / 4 + 1 / 5, 1 / 5]
    assert expected_with_sinks(3, 3.0) == pytest.approx(by_hand)
    assert accumulated(3, draws=1, scale=0.0, sink=math.log(3))[0] == pytest.approx(by_hand)
    two = [1 + 1 / 2 + 3 / 7, 1 / 2 + 3 / 7, 1 / 7]  # two sinks: rows 1; 1/2 1/2; 3/7 3/7 1/7
    assert expected_with_sinks(3, 3.0, sinks=2) == pytest.approx(two)
    assert accumulated(3, draws=1, scale=0.0, sink=math.log(3), sinks=2)[0] == pytest.approx(two)
    assert expected_with_sinks(50, 1.0) == pytest.approx(expected_accumulation(50))


def test_slope_on_a_line() -> None:
    x = np.log(100 / np.arange(1, 101))
    assert slope_on_log(3 * x + 0.5) == pytest.approx((3, 0.5))
    assert slope_on_log(np.stack([2 * x, 4 * x]), 5, 60) == pytest.approx((3, 0))  # the mean of two rows
    with pytest.raises(ValueError, match=r"positions 5\.\.200"):
        slope_on_log(x, 5, 200)


def test_quoted_values_of_the_expectation() -> None:
    """For n = 3600: 8.77 at j = 1, 3.59 at 100, 0.88 at 1500, 0.18 at 3000."""
    curve = expected_accumulation(3600)
    assert [round(float(curve[j - 1]), 2) for j in (1, 100, 1500, 3000)] == [8.77, 3.59, 0.88, 0.18]


def test_gaussian_attention_follows_the_expectation() -> None:
    n = 600
    sums = accumulated(n, draws=24)
    assert sums.sum(axis=1) == pytest.approx(n)  # every row hands out 1
    expected = expected_accumulation(n)
    slope, _ = slope_on_log(sums)
    assert slope == pytest.approx(slope_on_log(expected)[0], abs=0.06)
    assert slope == pytest.approx(1, abs=0.06)
    # Decile by decile, within four standard errors of the draws.
    means = sums.reshape(24, 10, n // 10).mean(axis=2)
    error = means.std(axis=0, ddof=1) / math.sqrt(24)
    assert (np.abs(means.mean(axis=0) - expected.reshape(10, -1).mean(axis=1)) < 4 * error + 0.01).all()


def test_with_a_sink_the_theory_fails_as_predicted() -> None:
    n, weight = 600, 200.0
    sums = accumulated(n, draws=24, scale=0.0, sink=math.log(weight))
    assert sums[0] == pytest.approx(expected_with_sinks(n, weight))
    curve = expected_with_sinks(n, weight)
    slope, _ = slope_on_log(accumulated(n, draws=24, sink=math.log(weight)), first=2)
    assert slope == pytest.approx(slope_on_log(curve, first=2)[0], abs=0.15)  # its weight varies from row to row
    assert slope < 0.6  # exchangeable: 1. The sink takes what the early tokens would have received
    assert curve[0] > 200  # the sink holds over a third of all n
    plain = expected_accumulation(n)
    assert curve[1] / curve[n // 2] == pytest.approx(math.log(799 / 201) / math.log(799 / 500), rel=0.01)  # 2.9
    assert plain[1] / plain[n // 2] > 8


@pytest.mark.parametrize(
    ("visible", "budget", "gain", "entropy", "ordinary"),
    [
        (7500, 1000, 2.007, 6.98, 8.44),
        (3950, 720, 1.845, 6.54, None),
        (4096, 256, 2.355, 5.69, None),
        (1024, 128, 2.039, 4.99, None),
        (7500, 128, 2.853, 5.13, None),
    ],
)
def test_entropy_of_sharpened_rows(
    visible: int, budget: int, gain: float, entropy: float, ordinary: float | None
) -> None:
    found = row_entropy(visible, budget)
    assert found.gain == pytest.approx(gain, abs=1e-3)
    assert found.sharpened == pytest.approx(entropy, abs=0.12)
    assert found.sharpened == pytest.approx(found.target, abs=0.35)
    assert found.ordinary > found.target + 1
    if ordinary is not None:
        assert found.ordinary == pytest.approx(ordinary, abs=0.05)
    assert found.predicted[1] == pytest.approx(found.target)  # ln i - ln(i/k)


def test_a_gain_of_one_is_the_ordinary_softmax() -> None:
    """i / k = sqrt(e): g = 1."""
    found = row_entropy(1649, 1000)
    assert found.gain == pytest.approx(1, abs=1e-3)
    assert found.sharpened == pytest.approx(found.ordinary, abs=2e-3)
