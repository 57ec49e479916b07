"""Intervals and tests against hand-computed figures, against scipy, and by simulation."""

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from scipy import stats

from src.compare import intervals as statistics
from src.compare.intervals import (
    Interval,
    _resample,
    bootstrap_intervals,
    check_resamples,
    holm,
    macro_mean,
    macro_stderr,
    sign_flip_pvalues,
)
from src.errors import InputError
from src.study import retention_tables as reference_retention
from src.study.retention_tables import ratio_interval

TASKS = np.array([0, 0, 0, 1, 1])
SCORES = np.array([[1.0], [2.0], [3.0], [10.0], [14.0]])


def only(values: np.ndarray, tasks: np.ndarray, **settings: float) -> Interval:
    return bootstrap_intervals(values, tasks, **settings)[0]  # type: ignore[arg-type]


def test_macro_mean_weighs_tasks_not_samples() -> None:
    assert macro_mean(SCORES, TASKS)[0] == pytest.approx((2 + 12) / 2)
    assert macro_mean(np.array([[1.0], [np.nan], [3.0], [np.nan], [np.nan]]), TASKS)[0] == pytest.approx(2)
    assert np.isnan(macro_mean(np.full((5, 1), np.nan), TASKS)[0])


def test_standard_error_by_hand() -> None:
    # task 0: variance 1 of 3 samples; task 1: variance 8 of 2 samples; two tasks
    stderr, freedom = macro_stderr(SCORES, TASKS)
    assert stderr[0] == pytest.approx(np.sqrt(1 / 3 + 8 / 2) / 2)
    assert freedom[0] == pytest.approx((1 / 3 + 4) ** 2 / ((1 / 3) ** 2 / 2 + 4**2 / 1))


def test_standard_error_of_one_task_is_the_textbook_one() -> None:
    scores = np.random.default_rng(1).normal(50, 10, (40, 1))
    stderr, freedom = macro_stderr(scores, np.zeros(40, dtype=int))
    assert stderr[0] == pytest.approx(stats.sem(scores[:, 0]))
    assert freedom[0] == pytest.approx(39)


def test_a_task_with_one_sample_has_no_interval() -> None:
    interval = only(np.array([[1.0], [2.0], [5.0]]), np.array([0, 0, 1]))
    assert interval.estimate == pytest.approx((1.5 + 5) / 2) and interval.n == 3
    assert np.isnan([interval.low, interval.high, interval.stderr]).all()


def test_equal_scores_give_an_interval_of_no_width() -> None:
    interval = only(np.full((8, 1), 7.0), np.repeat([0, 1], 4))
    assert (interval.low, interval.high, interval.stderr) == pytest.approx((7.0, 7.0, 0.0))


def test_the_bootstrap_has_the_unbiased_variance() -> None:
    scores = np.array([[0.0], [0.0], [0.0], [100.0]])
    draws = _resample(scores, np.zeros(4, dtype=int), 40_000, 0)
    assert draws.std() == pytest.approx(stats.sem(scores[:, 0]), rel=0.02)  # a plain bootstrap gives 0.866 of it


def test_interval_is_seeded_and_agrees_with_student_for_normal_data() -> None:
    scores = np.random.default_rng(0).normal(50, 10, (60, 1))
    tasks = np.zeros(60, dtype=int)
    interval = only(scores, tasks)
    assert interval == only(scores, tasks) and interval != only(scores, tasks, seed=1)
    low, high = stats.t.interval(0.95, 59, loc=scores.mean(), scale=stats.sem(scores[:, 0]))
    assert interval.low == pytest.approx(low, abs=0.25) and interval.high == pytest.approx(high, abs=0.25)


@pytest.mark.parametrize("per_task", [8, 30])
@pytest.mark.parametrize("kind", ["normal", "binary", "f1"])
def test_intervals_cover_the_truth(kind: str, per_task: int) -> None:
    """2,000 simulated studies of four unlike tasks, a column each: 95 % of the intervals hold the truth."""
    generator = np.random.default_rng(7)
    studies, parts, truth = 2_000, [], 0.0
    for task in range(4):
        size = (per_task, studies)
        if kind == "normal":
            parts.append(generator.normal(10 * task, 5 + task, size))
            truth += 10 * task / 4
        elif kind == "binary":
            rate = (0.2, 0.4, 0.6, 0.8)[task]
            parts.append(100.0 * (generator.random(size) < rate))
            truth += 100 * rate / 4
        else:
            parts.append(100 * generator.beta(0.4 + 0.2 * task, 0.9, size))
            truth += 100 * (0.4 + 0.2 * task) / (1.3 + 0.2 * task) / 4
    values, tasks = np.concatenate(parts), np.repeat(np.arange(4), per_task)
    intervals = bootstrap_intervals(values, tasks, resamples=4_000)
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.935 <= covered <= 0.975


def test_pairing_narrows_the_interval() -> None:
    generator = np.random.default_rng(3)
    hard = generator.normal(50, 20, (50, 1))
    one, other = hard + generator.normal(0, 2, (50, 1)), hard + generator.normal(1, 2, (50, 1))
    single, paired = bootstrap_intervals(np.hstack([one, one - other]), np.zeros(50, dtype=int))
    assert (paired.high - paired.low) < (single.high - single.low) / 4


def test_missing_samples_change_only_their_column() -> None:
    values = np.random.default_rng(5).normal(size=(20, 2))
    tasks = np.repeat([0, 1], 10)
    whole = bootstrap_intervals(values, tasks)
    values[3, 1] = np.nan
    holed = bootstrap_intervals(values, tasks)
    alone = only(np.delete(values[:, 1:], 3, axis=0), np.delete(tasks, 3))
    assert astuple(holed[0]) == pytest.approx(astuple(whole[0]))
    assert astuple(holed[1]) == pytest.approx(astuple(alone)) and holed[1].n == 19


def test_sign_flip_by_hand() -> None:
    # differences 1, 2, 3: |sum| = 6 is reached by 2 of 8 sign patterns; -1, 2, 3: |sum| >= 4 by 4 of 8
    columns = np.array([[1.0, -1.0, 0.0], [2.0, 2.0, 0.0], [3.0, 3.0, 0.0]])
    assert sign_flip_pvalues(columns, np.zeros(3, dtype=int)) == pytest.approx([0.25, 0.5, 1.0])


def test_sign_flip_weighs_tasks_equally() -> None:
    # a sample of task 0 weighs 1/2, of task 1 weighs 1: steps 2, 2, -1; |sum| >= 3 for 4 of 8 patterns
    differences = np.array([[4.0], [4.0], [-1.0]])
    assert sign_flip_pvalues(differences, np.array([0, 0, 1]))[0] == pytest.approx(4 / 8)


def test_sign_flip_agrees_with_scipy() -> None:
    differences = np.random.default_rng(11).normal(0.4, 1, (30, 1))
    expected = stats.permutation_test(
        (differences[:, 0],),
        np.mean,
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    assert sign_flip_pvalues(differences, np.zeros(30, dtype=int), 20_000)[0] == pytest.approx(
        expected.pvalue, abs=0.01
    )


def test_sign_flip_rejects_at_the_promised_rate() -> None:
    """2,000 studies without a true difference: about 5 % of the p-values are below 0.05; none is zero."""
    differences = np.random.default_rng(2).standard_t(3, (24, 2_000))
    pvalues = sign_flip_pvalues(differences, np.repeat([0, 1, 2], 8), resamples=2_000)
    assert 0.035 <= np.mean(pvalues < 0.05) <= 0.065
    assert pvalues.min() >= 1 / 2_001 and not np.isnan(pvalues).any()


def test_sign_flip_without_pairs_says_nothing() -> None:
    assert np.isnan(sign_flip_pvalues(np.full((4, 1), np.nan), np.zeros(4, dtype=int))[0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    corrected = holm([0.02, float("nan"), 0.01])
    assert corrected[0] == pytest.approx(0.02) and np.isnan(corrected[1]) and corrected[2] == pytest.approx(0.02)
    assert holm([]) == []


def test_draws_fit_into_memory_however_many_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in turn, resamples in blocks: the same intervals from a hundredth of the room."""
    values = np.random.default_rng(1).normal(50, 20, (40, 6))
    tasks = np.repeat([0, 1], 20)
    whole = bootstrap_intervals(values, tasks, resamples=2_000)
    ratio = ratio_interval(values[:, 0], values[:, 1], resamples=2_000)
    held: list[int] = []
    resample = statistics._resample

    def noting(*arguments: Any) -> Any:
        held.append((found := resample(*arguments)).size)
        return found

    monkeypatch.setattr(statistics, "_resample", noting)
    for module in (statistics, reference_retention):
        monkeypatch.setattr(module, "CELLS", 4_000)
    for mine, theirs in zip(bootstrap_intervals(values, tasks, resamples=2_000), whole, strict=True):
        assert astuple(mine) == pytest.approx(astuple(theirs), rel=1e-12)  # BLAS sums a block in another order
    assert held == [4_000] * 3
    assert ratio_interval(values[:, 0], values[:, 1], resamples=2_000) == ratio


@pytest.mark.parametrize("count", [-1, 0, 999, 1_000_001, 10**11, 10**30])
def test_resamples_out_of_bounds_are_one_line(count: int) -> None:
    with pytest.raises(InputError, match=rf"^--resamples {count}: .*; valid: 1000 to 1000000$"):
        check_resamples(count)
