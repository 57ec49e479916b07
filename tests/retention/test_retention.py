"""Every measure of retention against figures worked out by hand, and the stored form against what went in."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from src.errors import InputError
from src.records.record import Record
from src.retention import measures as retention
from src.retention.from_records import needle
from src.retention.journal import Journal
from src.retention.per_head import PER_HEAD, Measure
from src.retention.plot import plot_retention
from src.retention.profile import profile, sample_measures, summarise
from src.retention.store import Kept, KeptSample, bin_counts, kept_sample, load_retention, write_retention
from src.study.retention_tables import needles, octave_table, slopes

NAN = float("nan")


def kept_set(n: int, *positions: int) -> np.ndarray:
    kept = np.zeros(n, dtype=bool)
    kept[list(positions)] = True
    return kept


def sample(n: int, heads: list[list[int]], end: list[list[int]] | None = None, **options: Any) -> KeptSample:
    """One layer; the positions of every head."""
    mode, key = options.pop("mode", "positions"), ("qa", "1", "aa")
    return kept_sample(options.get("key", key), n, Kept([heads], None if end is None else [end]), mode)


# --- where the kept positions lie ---


def test_bins_hold_positions_by_floor_of_64_p_over_n() -> None:
    for n in (1, 5, 63, 64, 65, 100, 1000):
        random = np.random.default_rng(n).random((2, 3, n)) < 0.4
        expected = np.zeros((2, 3, 64), dtype=int)
        for i, j, p in zip(*np.nonzero(random), strict=True):
            expected[i, j, 64 * p // n] += 1
        assert np.array_equal(bin_counts(random), expected)
        assert retention.capacity(n).sum() == n


def test_histogram_is_of_kept_entries() -> None:
    shares = retention.histogram(kept_set(128, 0, 1, 2, 127))  # two positions per bin
    assert shares[0] == 0.5
    assert shares[1] == 0.25
    assert shares[63] == 0.25
    assert shares.sum() == 1


def test_decile_shares_with_and_without_the_recent_window() -> None:
    kept = kept_set(20, 0, 1, 5, 18, 19)
    assert retention.decile_shares(kept).tolist() == [0.4, 0, 0.2, 0, 0, 0, 0, 0, 0, 0.4]
    # without the last ten positions the domain is 0..9, one position per tenth, and three entries are left
    assert retention.decile_shares(kept, exclude_recent=10) == pytest.approx([1 / 3, 1 / 3, 0, 0, 0, 1 / 3, 0, 0, 0, 0])


def test_a_head_without_entries_in_the_domain_has_no_shares() -> None:
    kept = kept_set(20, 18, 19)
    assert np.isnan(retention.decile_shares(kept, exclude_recent=2)).all()
    assert np.isnan(retention.mean_position(kept, exclude_recent=2))
    assert np.isnan(retention.histogram(kept, exclude_recent=50)).all()


def test_occupancy_is_of_positions() -> None:
    assert retention.occupancy(kept_set(10, 0, 1, 2, 9), bins=5).tolist() == [1, 0.5, 0, 0, 0.5]
    assert retention.occupancy(kept_set(10, 0, 1, 2, 9), bins=2, exclude_recent=2).tolist() == [0.75, 0]
    assert np.isnan(retention.occupancy(kept_set(1, 0), bins=2)).tolist() == [False, True]


def test_mean_position_of_a_uniform_set_is_one_half() -> None:
    assert retention.mean_position(np.ones(7, dtype=bool)) == pytest.approx(0.5)
    assert retention.mean_position(kept_set(10, 0, 1)) == pytest.approx(0.1)  # (0.05 + 0.15) / 2
    assert retention.mean_position(kept_set(10, 0, 1, 9), exclude_recent=5) == pytest.approx(0.2)  # (.1 + .3) / 2


def test_recent_window_is_the_suffix_that_all_heads_kept() -> None:
    heads = np.stack([kept_set(10, 2, 6, 7, 8, 9), kept_set(10, 1, 7, 8, 9)])[None]
    assert retention.recent_window(heads) == 3
    assert retention.recent_window(heads[..., :9]) == 2
    assert retention.recent_window(np.ones((1, 2, 5), dtype=bool)) == 5
    assert retention.recent_window(heads[..., :6]) == 0


def test_kl_to_uniform_by_hand() -> None:
    assert retention.kl_to_uniform([0.25] * 4) == pytest.approx(0)
    assert retention.kl_to_uniform([1, 0, 0, 0]) == pytest.approx(math.log(4))
    assert retention.kl_to_uniform([0.75, 0.25]) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    # bins of one and three positions: keeping everything is uniform over positions
    assert retention.kl_to_uniform([0.25, 0.75], positions=[1, 3]) == pytest.approx(0)
    assert retention.kl_to_uniform([0.5, 0.5], positions=[1, 3]) == pytest.approx(0.5 * math.log(2 * 2 / 3))
    assert np.isnan(retention.kl_to_uniform([NAN, NAN]))


def test_gini_by_hand() -> None:
    assert retention.gini([0.25] * 4) == pytest.approx(0)
    assert retention.gini([0, 0, 1, 0]) == pytest.approx(0.75)  # 1 - 1/4
    # sorted 0.1, 0.2, 0.3, 0.4: the Lorenz curve 0.1, 0.3, 0.6, 1 has area (0.1/2 + 0.2 + 0.45 + 0.8) / 4 =
    # 0.375
    assert retention.gini([0.4, 0.1, 0.3, 0.2]) == pytest.approx(1 - 2 * 0.375)
    assert retention.gini([0.25, 0.75], positions=[1, 3]) == pytest.approx(0)
    assert retention.gini([0.5, 0.5], positions=[1, 3]) == pytest.approx(0.25)  # curve (.75, .5), (1, 1)
    assert retention.gini([[1, 0], [0.5, 0.5]]).tolist() == [0.5, 0]
    assert retention.gini([0.5, 0.5, 0], positions=[1, 1, 0]) == pytest.approx(0)  # a bin without positions


# --- a span, two policies, two moments ---


def test_share_of_a_span_kept() -> None:
    kept = np.stack([kept_set(10, 3, 4, 9), kept_set(10, 9)])
    assert retention.share_of_span_kept(kept, 3, 7).tolist() == [0.5, 0]
    with pytest.raises(ValueError, match="not in a prompt of 10"):
        retention.share_of_span_kept(kept, 8, 11)


def test_span_retention_over_samples() -> None:
    first = sample(10, [[3, 4, 5, 6], [3, 9]], end=[[3, 4, 9, 10], [9, 10]])
    found = retention.span_retention([first], {("qa", "1"): (3, 7)})
    assert found["after_prompt"] == pytest.approx((1 + 0.25) / 2)
    assert found["at_end"] == pytest.approx((0.5 + 0) / 2)
    assert found["whole_in_some_head"] == 1
    assert found["per_task"] == {"qa": pytest.approx((1 + 0.25) / 2)}
    assert retention.span_retention([first], {("qa", "2"): (3, 7)}) == {"samples": 0}


def test_jaccard_by_hand() -> None:
    a, b = kept_set(10, 0, 1, 8, 9), kept_set(10, 1, 2, 8, 9)
    assert retention.jaccard(a, b) == pytest.approx(3 / 5)
    assert retention.jaccard(a, b, exclude_recent=2) == pytest.approx(1 / 3)
    assert np.isnan(retention.jaccard(kept_set(4), kept_set(4)))


def test_drift_is_the_share_of_the_prompts_entries_lost() -> None:
    assert retention.drift(kept_set(10, 0, 1, 2, 3), kept_set(10, 0, 5)) == pytest.approx(0.75)
    assert retention.drift(kept_set(10, 0), kept_set(10, 0)) == 0
    assert np.isnan(retention.drift(kept_set(10), kept_set(10, 0)))


def write(path: Path, *samples: KeptSample) -> retention.Retention:
    by_key = {each.key: each for each in samples}
    write_retention(path, list(by_key), by_key.__getitem__)
    return load_retention(path)


def test_overlap_matches_samples_by_task_id_and_prompt(tmp_path: Path) -> None:
    keys = [("qa", "1", "aa"), ("qa", "2", "aa"), ("code", "1", "aa"), ("code", "2", "old")]
    a = write(tmp_path / "a.npz", *(sample(10, [[0, 1], [0, 1]], key=key) for key in keys))
    other = [*keys[:3], ("code", "2", "new")]
    sets = [[[0, 1], [0, 1]], [[0, 2], [5, 6]], [[0, 1], [7, 8]], [[0, 1], [0, 1]]]
    b = write(tmp_path / "b.npz", *(sample(10, s, key=key) for key, s in zip(other, sets, strict=True)))
    found = retention.overlap(a, b)
    assert found["samples"] == 3  # the fourth has another prompt
    assert found["per_task"] == {"code": pytest.approx(0.5), "qa": pytest.approx((1 + 1 + 1 / 3 + 0) / 4)}
    assert found["mean"] == pytest.approx((1 + 1 + 1 / 3 + 0 + 1 + 0) / 6)
    assert found["per_head"] == [[pytest.approx((1 + 1 / 3 + 1) / 3), pytest.approx(1 / 3)]]
    assert found["per_layer"] == [pytest.approx(found["mean"])]


def test_overlap_refuses_nothing_in_common_and_other_models(tmp_path: Path) -> None:
    a = write(tmp_path / "a.npz", sample(10, [[0], [0]]))
    with pytest.raises(InputError, match="no sample in common"):
        retention.overlap(a, write(tmp_path / "b.npz", sample(10, [[0], [0]], key=("qa", "9", "aa"))))
    with pytest.raises(InputError, match="different models"):
        retention.overlap(a, write(tmp_path / "c.npz", sample(10, [[0]])))


# --- accumulated attention against position ---


def test_expected_accumulation_is_a_difference_of_harmonic_numbers() -> None:
    assert retention.expected_accumulation(3) == pytest.approx([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3])
    theory = retention.expected_accumulation(3600)
    assert theory[[0, 99, 1499, 2999]].round(2).tolist() == [8.77, 3.59, 0.88, 0.18]


def test_theory_is_what_uniform_causal_rows_add_up_to() -> None:
    rows = np.tril(np.ones((50, 50))) / np.arange(1, 51)[:, None]
    assert rows.sum(axis=0) == pytest.approx(retention.expected_accumulation(50))


def test_log_slope_of_a_power_law_is_its_exponent() -> None:
    j = np.arange(1, 101)
    assert retention.log_slope(np.stack([3 / j, np.ones(100), j**0.5])) == pytest.approx([-1, 0, 0.5])
    broken = np.where(j == 7, 0, 2.0 / j**2)
    assert retention.log_slope(broken) == pytest.approx(-2)  # a zero has no logarithm and is left out
    # through (ln 1, ln 8) and (ln 2, ln 2): ln(2/8) / ln 2 = -2
    assert retention.log_slope([8, 2, 100], first=1, last=2) == pytest.approx(-2)
    with pytest.raises(ValueError, match="at least two"):
        retention.log_slope([1, 2, 3], first=3)


def test_slope_beside_theory() -> None:
    theory = retention.expected_accumulation(200)
    found = retention.slope_beside_theory(np.stack([theory, np.ones(200)]), first=1, last=100)
    assert found["measured"][0] == pytest.approx(found["theory"])
    assert found["measured"][1] == pytest.approx(0)
    assert found["theory"] < -0.3


# --- what is stored ---


def test_positions_come_back_as_they_went_in(tmp_path: Path) -> None:
    prompt = [torch.tensor([[0, 3, 9], [1, 2, 9]]), torch.tensor([[4, 5, 6], [7, 8, 9]])]
    end = [torch.tensor([[0, 9, 10], [1, 10, 11]]), torch.tensor([[10, 11, -1], [7, 8, 9]])]
    journal = Journal(tmp_path / "retention.part")
    journal.append(kept_sample(("qa", "é", "aa"), 10, Kept(prompt, end)))
    again = Journal(tmp_path / "retention.part")
    write_retention(tmp_path / "retention.npz", list(again.frames), again.read)
    back = load_retention(tmp_path)
    assert len(back) == 1
    found = next(iter(back))
    assert (found.task, found.id, found.n, found.binned) == ("qa", "é", 10, False)
    assert found.kept().shape == (2, 2, 10)
    assert [[np.flatnonzero(h).tolist() for h in layer] for layer in found.kept()] == [
        [[0, 3, 9], [1, 2, 9]], [[4, 5, 6], [7, 8, 9]],
    ]  # fmt: skip
    assert [[np.flatnonzero(h).tolist() for h in layer] for layer in found.kept("end")] == [
        [[0, 9], [1]], [[], [7, 8, 9]],
    ]  # fmt: skip
    assert found.generated.tolist() == [[1, 2], [2, 0]]


def test_heads_may_keep_different_numbers() -> None:
    ragged = kept_sample(("qa", "1", "a"), 8, Kept([[[0], [1, 2, 3]], [torch.tensor([7]), torch.tensor([])]]))
    assert ragged.kept().sum(axis=-1).tolist() == [[1, 3], [1, 0]]
    assert np.array_equal(ragged.kept("end"), ragged.kept())


def test_bins_store_counts_only_and_say_so(tmp_path: Path) -> None:
    found = next(iter(write(tmp_path / "r.npz", sample(128, [[0, 1, 2, 127, 130]], mode="bins"))))
    assert found.counts()[0, 0, [0, 1, 63]].tolist() == [2, 1, 1]
    assert found.generated.tolist() == [[1]]
    with pytest.raises(InputError, match="needs retention=positions"):
        found.kept()


def test_the_file_can_be_read_as_documented(tmp_path: Path) -> None:
    write(tmp_path / "r.npz", sample(10, [[0, 3]], end=[[3, 12]]), sample(10, [[1, 2]], key=("qa", "2", "bb")))
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        assert int(file["schema"]) == 1
        assert file["key"].tolist() == [["qa", "1", "aa"], ["qa", "2", "bb"]]
        assert np.unpackbits(file["prompt_000000"], axis=-1, count=10)[0, 0].nonzero()[0].tolist() == [0, 3]
        assert file["end_same"].tolist() == [False, True]
        assert file["generated_000000"].tolist() == [[1]]
        assert "end_000001" not in file


def test_other_schemas_and_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    for schema in (0, 2):
        np.savez(tmp_path / "old.npz", schema=np.asarray(schema))
        with pytest.raises(InputError, match=f"schema {schema}, this version reads schema 1.*overwrite=true"):
            load_retention(tmp_path / "old.npz")
    np.savez(tmp_path / "none.npz", counts=np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "pickle.npz").write_bytes(b"\x80\x04N.")
    for name in ("none.npz", "text.npz", "pickle.npz"):
        with pytest.raises(InputError, match="not a retention file"):
            load_retention(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        load_retention(tmp_path)


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_torn_journal_loses_only_its_last_entry(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "retention.part"
    journal = Journal(path)
    journal.append(sample(10, [[0, 1]]))
    journal.append(sample(10, [[2, 3]], key=("qa", "2", "aa")))
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    assert list(again.frames) == [("qa", "1", "aa")]
    again.append(sample(10, [[4]], key=("qa", "3", "aa")))
    assert np.flatnonzero(Journal(path).read(("qa", "3", "aa")).kept()[0, 0]).tolist() == [4]


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    path = tmp_path / "retention.part"
    journal = Journal(path)
    for i in range(2):
        journal.append(sample(10, [[0, 1]], key=("qa", str(i), "aa")))
    data = bytearray(path.read_bytes())
    data[journal.frames[("qa", "0", "aa")][1] - 3] ^= 255
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"entry of qa 0 is damaged"):
        Journal(path).read(("qa", "0", "aa"))


# --- over a run ---


def test_summary_by_hand() -> None:
    """Ten positions, one layer, two heads; the last two positions are the recent window."""
    first = sample(10, [[0, 1, 8, 9], [0, 7, 8, 9]], end=[[0, 8, 9, 10], [0, 7, 9, 10]])
    second = sample(10, [[0, 1, 8, 9], [0, 1, 8, 9]], key=("code", "1", "aa"))
    found = summarise([first, second])
    assert found["samples"] == 2
    assert found["kept_mean"] == 4
    assert found["recent_mean"] == 2
    assert found["kept_whole"] == 0
    assert found["generated_mean"] == 0.5
    assert found["drift"] == pytest.approx((0.25 + 0.25 + 0 + 0) / 4)
    # tenths: four heads hold position 0, three 1, one 7, four 8 and 9; each entry is a quarter of its head
    assert found["decile_shares"] == [0.25, 0.1875, 0, 0, 0, 0, 0, 0.0625, 0.25, 0.25]
    assert found["first_to_last_decile"] == 1
    # heavy: positions 0..7; heads hold {0, 1} three times and {0, 7} once
    heavy = found["heavy"]
    assert heavy["samples"] == 2
    assert heavy["mean_position"] == pytest.approx((3 * (0.5 + 1.5) / 2 + (0.5 + 7.5) / 2) / 4 / 8)
    assert heavy["decile_shares"][0] == 0.5
    assert heavy["decile_shares"][-1] == 0  # position 7 of 8 lies in tenth floor(70 / 8) = 8
    assert heavy["decile_shares"][8] == 0.125
    # per position: 1/2, 3/8, 0, .., 0, 1/8 of the entries, uniform 1/8
    kl = 0.5 * math.log(4) + 0.375 * math.log(3) + 0.125 * math.log(1)
    assert heavy["kl_uniform"] == pytest.approx(kl, abs=1e-5)
    assert found["per_head"]["mean_position"][0] == [
        pytest.approx((0.05 + 0.15 + 0.85 + 0.95) / 4),
        pytest.approx(((0.05 + 0.75 + 0.85 + 0.95) / 4 + 0.5) / 2),
    ]
    assert found["per_layer"]["first_decile"] == [0.25]
    assert found["per_layer"]["drift"] == [0.125]
    assert found["per_head"]["drift"] == [[0.125, 0.125]]
    assert found["per_task"]["code"]["drift"] == 0
    assert set(found["per_task"]) == {"qa", "code"}
    assert found["per_task"]["code"]["heavy"]["mean_position"] == pytest.approx(1 / 8)


def test_a_measure_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sets of `test_summary_by_hand`: the first position that a head kept, as a share of the prompt."""
    first = Measure(
        lambda kept: kept.argmax(axis=-1) / kept.shape[-1],
        lambda shares: (shares > 0).argmax(axis=-1) / shares.shape[-1],
        "the first", "share of the prompt", "first", "0 start",
    )  # fmt: skip
    monkeypatch.setitem(PER_HEAD, "first", first)
    samples = [sample(10, [[0, 1, 8, 9], [2, 7, 8, 9]]), sample(10, [[4, 8, 9], [0, 8, 9]], key=("code", "1", "aa"))]
    found = summarise(samples)
    assert found["first"] == pytest.approx((0 + 0.2 + 0.4 + 0) / 4)
    assert found["per_head"]["first"] == [[pytest.approx(0.2), pytest.approx(0.1)]]
    assert found["per_task"]["code"]["first"] == found["per_layer"]["first"][0] + 0.05 == 0.2
    assert found["heavy"]["first"] == pytest.approx((0 + 2 / 8 + 4 / 8 + 0) / 4)
    binned = summarise([sample(640, [[64, 65], [0]], mode="bins")])
    assert binned["first"] == pytest.approx((6 / 64 + 0) / 2, abs=1e-5)


def test_keeping_everything_is_uniform_and_has_no_heavy_part() -> None:
    found = summarise([sample(100, [list(range(100))] * 2)])
    assert found["kl_uniform"] == 0
    assert found["gini"] == 0
    assert found["mean_position"] == 0.5
    assert found["kept_whole"] == 1
    assert found["heavy"] is None
    assert found["heavy_per_head"] is None


def test_a_known_recent_window_overrides_the_observed_one() -> None:
    each = sample(10, [[0, 7, 8, 9]])
    assert summarise([each])["recent_mean"] == 3
    found = summarise([each], recent=2)
    assert found["recent_mean"] == 2
    assert found["heavy"]["mean_position"] == pytest.approx((0.5 + 7.5) / 2 / 8)


def test_a_head_that_kept_only_the_window_does_not_count_in_heavy() -> None:
    found = summarise([sample(10, [[0, 8, 9], [8, 9]])])
    assert found["heavy"]["mean_position"] == pytest.approx(0.5 / 8)
    assert found["heavy_per_head"]["mean_position"] == [[pytest.approx(0.5 / 8), None]]


def test_binned_samples_give_the_same_histogram_and_close_deciles() -> None:
    random = np.random.default_rng(0)
    heads = [sorted(random.permutation(640)[:100].tolist()) for _ in range(2)]
    exact, binned = (summarise([sample(640, heads, mode=mode)]) for mode in ("positions", "bins"))
    assert binned["histogram"] == exact["histogram"]
    assert binned["kl_uniform"] == exact["kl_uniform"]
    assert binned["decile_shares"] == pytest.approx(exact["decile_shares"], abs=0.01)
    assert sum(binned["decile_shares"]) == pytest.approx(1, abs=1e-4)
    assert binned["mean_position"] == pytest.approx(exact["mean_position"], abs=0.01)
    assert binned["heavy"] is None
    assert binned["drift"] is None


def test_a_row_per_sample_for_bootstrapping() -> None:
    row = sample_measures(sample(10, [[0, 1, 8, 9], [0, 7, 8, 9]], end=[[0, 8, 9, 10], [0, 7, 9, 10]]))
    assert (row["task"], row["id"], row["n"], row["kept"], row["recent"]) == ("qa", "1", 10, 4, 2)
    assert row["first_decile"] == 0.25
    assert row["heavy_first_decile"] == 0.5
    assert row["drift"] == 0.25
    assert row["generated"] == 1


def test_nothing_recorded_has_no_summary() -> None:
    assert summarise([]) == {}


def test_the_picture_is_drawn_for_any_run(tmp_path: Path) -> None:
    for name, samples in {
        "long": [sample(300, [list(range(0, 300, 7))] * 2)],
        "shorter than 64 tokens": [sample(5, [[0, 4]])],
        "binned": [sample(300, [[1, 2]], mode="bins")],
    }.items():
        path = tmp_path / f"{name}.png"
        plot_retention(profile(samples), path, "h2o, tiny, budget 8")
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 500
        assert pixels.std() > 0.05


def test_needles_in_metrics_and_tables_by_hand() -> None:
    """Two samples of two heads; the third has no needle and counts nowhere."""
    first = sample(10, [[3, 4, 5, 6], [3, 9]], end=[[3, 4, 9, 10], [9, 10]])
    second = sample(10, [[0, 1], [8, 9]], key=("qa", "2", "aa"))
    records = [
        Record(task="qa", id="1", prompt_hash="aa", needle=[3, 7]),
        Record(task="qa", id="2", prompt_hash="aa", needle=[0, 1]),
        Record(task="qa", id="3", prompt_hash="aa"),
    ]
    found = needle([first, second], records)["needle"]
    assert found["samples"] == 2
    assert found["after_prompt"] == pytest.approx(((1 + 0.25) / 2 + (1 + 0) / 2) / 2, abs=1e-5)
    assert found["per_task"] == {"qa": found["after_prompt"]}
    assert needle([first], [Record(task="qa", id="1", prompt_hash="aa")]) == {}


def test_a_studys_figures_by_hand() -> None:
    """What a study makes of records: slopes as means over layers and heads, octaves that all prompts reach."""
    first, second = sample(10, [[3, 4, 5, 6], [3, 9]]), sample(10, [[0, 1], [8, 9]], key=("qa", "2", "aa"))
    figures = (
        {"score_slope": [[-1.0, -0.5], [0.0, None]], "score_by_octave": [[4, 2], [2, None]]},
        {"score_slope": [[1.0, 1.0], [1.0, 1.0]], "score_by_octave": [[1, 1, 9], [3, 1, 9]]},
    )
    records = {
        first.key: Record(task="qa", id="1", prompt_hash="aa", needle=[3, 7], measures=figures[0]),
        second.key: Record(task="qa", id="2", prompt_hash="aa", measures=figures[1]),
    }
    run: Any = SimpleNamespace(records=records, model="m", policy="h2o", label="h2o kernel=1", budget=4, full=False)
    assert needles(run, [first, second]) == {"needle": [(1 + 0.25) / 2], "needle_end": [(1 + 0.25) / 2]}
    assert slopes(run, set(records))["score_slope"] == pytest.approx([-0.5, 1])
    study: Any = SimpleNamespace(runs=[run], keys=list(records))
    table = octave_table(study, 1000)
    assert table["first"].tolist() == [1, 2] and set(table["options"]) == {"kernel=1"}
    assert table["value"].tolist() == pytest.approx([(3 + 2) / 2, (2 + 1) / 2])
