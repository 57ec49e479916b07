"""The report over synthetic run folders: what it says, what it refuses, and what the page may not do."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.compare.analysis import analyse
from src.compare.matched import make_study
from src.compare.runs import find_runs
from src.errors import InputError
from src.records.metrics_file import write_metrics
from src.report.__main__ import main
from src.report.contrasts import contrasts, retention_maps
from src.report.formats import Column, Table, TableCell, comma_separated, latex, markdown, number
from src.report.html import page
from src.report.plots import make_figures, pareto_front
from src.report.sentences import headline, notes, summary
from src.report.tables import comparison_table, make_tables, memory_table, scores_table
from src.report.write import write_report
from src.retention.store import Kept
from tests.support.synthetic_runs import METRICS, kept_positions, record, write_run, write_study

Lines = list[dict[str, Any]]


def lines(*scores: float | None, task: str = "qasper", budget: float = 64, **more: Any) -> Lines:
    return [record(task, i, score, budget, **more) for i, score in enumerate(scores)]


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    write_study(root, per_task=6, budgets=(64, 128), retention=True, fidelity=True)
    return root


@pytest.fixture(scope="module")
def report(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    return write_report([study_folder], out, resamples=1000)[0]


# --- numbers ---


def small(tmp_path: Path) -> Path:
    """One task, four samples: full 100, snapkv 50, h2o 50 on three and one failed."""
    write_run(tmp_path, "full", 64, lines(100, 100, 80, 80))
    write_run(tmp_path, "snapkv", 64, lines(60, 50, 50, 40))
    write_run(tmp_path, "h2o", 64, lines(30, 40, 50, None))
    return tmp_path


def test_averages_and_differences_are_the_hand_computed_ones(tmp_path: Path) -> None:
    analysis = analyse(make_study([small(tmp_path)]), resamples=1000)
    full, h2o, snapkv = analysis.rows
    assert [row.run.label for row in analysis.rows] == ["full", "h2o", "snapkv"]
    assert full.average.estimate == 90 and snapkv.average.estimate == 50
    assert h2o.average.estimate == pytest.approx(40) and h2o.average.n == 3 and h2o.failed == 1
    assert snapkv.full is not None and snapkv.full.interval.estimate == -40  # -40, -50, -30, -40
    assert snapkv.full.interval.stderr == pytest.approx(np.std([-40, -50, -30, -40], ddof=1) / 2)
    assert snapkv.full.p == pytest.approx(2 / 16)  # all four of one sign: 2 of 16 patterns are as far out
    assert h2o.full is not None and h2o.full.interval.estimate == pytest.approx(-160 / 3)
    assert h2o.full.p == pytest.approx(2 / 8) and h2o.full.interval.n == 3
    assert (snapkv.full.p_holm, h2o.full.p_holm) == pytest.approx((0.25, 0.25))
    assert h2o.baseline is not None and h2o.baseline.interval.estimate == pytest.approx((-30 - 10 + 0) / 3)
    assert full.full is None and snapkv.baseline is None


def test_average_weighs_tasks_equally_and_matches_metrics_json(tmp_path: Path) -> None:
    path = write_run(tmp_path, records=[*lines(100, 100, 100), *lines(0, task="trec")])
    analysis = analyse(make_study([tmp_path]), resamples=1000)
    assert analysis.rows[0].average.estimate == 50
    assert json.loads((path / "metrics.json").read_text())["average"] == 50
    assert np.isnan(analysis.rows[0].average.low)  # one sample of trec: no interval rather than a wrong one
    assert "–" not in scores_table(analysis).rows[0][-1].text


def test_a_failed_sample_is_shown_and_takes_the_run_out_of_the_contest(tmp_path: Path) -> None:
    write_run(tmp_path, "ahakv", 64, lines(10, 10, 10, 10))
    table = scores_table(analyse(make_study([small(tmp_path)]), resamples=1000))
    shown = {row[0].text: row for row in table.rows}
    assert [c.name for c in table.columns] == ["policy", "budget", "qasper", "failed", "average"]
    assert table.columns[2].note == "qa_f1, n=4"
    assert shown["h2o"][2].text == "40.0 (n=3)" and shown["h2o"][4].text == "40.0†"
    assert shown["h2o"][3].text == "1" and shown["snapkv"][3].text == "0"
    assert [name for name, row in shown.items() if row[4].bold] == ["snapkv"]


def test_only_the_best_of_several_is_bold_and_ties_share_it(tmp_path: Path) -> None:
    write_run(tmp_path, "full", 64, lines(100, 100))
    write_run(tmp_path, "snapkv", 64, lines(50, 60))
    write_run(tmp_path, "h2o", 64, lines(60, 50))
    write_run(tmp_path, "snapkv", 128, lines(70, 70))
    table = scores_table(analyse(make_study([tmp_path]), resamples=1000))
    bold = [(row[0].text, row[1].text) for row in table.rows if row[-1].bold]
    assert bold == [("h2o", "64"), ("snapkv", "64")]  # alone at 128 there is nothing to win


def test_samples_are_matched_by_prompt_not_by_id_alone(tmp_path: Path) -> None:
    write_run(tmp_path, "full", 64, lines(100, 100, 100))
    write_run(tmp_path, "snapkv", 64, [*lines(50, 50), record("qasper", 2, 0, 64, prompt_hash="changed")])
    study = make_study([tmp_path])
    row = analyse(study, resamples=1000).rows[1]
    assert row.full is not None and row.full.interval.n == 2 and row.full.interval.estimate == -50
    assert any("another prompt" in text for text in study.warnings)


def test_baseline_is_compared_at_the_same_budget(study_folder: Path) -> None:
    analysis = analyse(make_study([study_folder], "h2o"), resamples=1000)
    by_cell = {row.run.cell: row for row in analysis.rows}
    snapkv, h2o = by_cell["snapkv at 128"], by_cell["h2o at 128"]
    assert snapkv.baseline is not None
    assert snapkv.baseline.interval.estimate == pytest.approx(snapkv.average.estimate - h2o.average.estimate)
    assert h2o.baseline is None


def test_same_seed_same_report(study_folder: Path) -> None:
    def table(seed: int) -> str:
        return comma_separated(comparison_table(analyse(make_study([study_folder]), 1000, seed)))

    assert table(0) == table(0) != table(1)


# --- finding, naming and refusing runs ---


def test_runs_are_found_below_a_folder_and_each_once(study_folder: Path) -> None:
    some = next(study_folder.glob("*/snapkv-64-*"))
    assert len(make_study([study_folder, some]).runs) == 9
    assert [run.cell for run in make_study([some]).runs] == ["snapkv at 64"]


def test_an_unfinished_run_is_named_and_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, "snapkv", 64, lines(1, 2))
    unfinished = write_run(tmp_path, "h2o", 64, lines(1, 2), finish=False)
    study = make_study([tmp_path])
    assert [run.label for run in study.runs] == ["snapkv"] and unfinished.name in " ".join(study.warnings)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_no_finished_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no finished run" in refusal(capsys, tmp_path)
    assert "no such folder" in refusal(capsys, tmp_path / "absent")
    write_run(tmp_path, finish=False, records=lines(1))
    assert "1 unfinished" in refusal(capsys, tmp_path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"chat_template": False}, "chat_template: true in .*, false in "),
        ({"max_prompt_tokens": 3500}, "max_prompt_tokens: 7500 in .*, 3500 in "),
        ({"task_versions": {"qasper": 2}}, "task_versions.qasper: 1 in .*, 2 in "),
        ({"new_field": "x"}, "new_field: not recorded in .*, x in "),
    ],
)
def test_other_comparability_is_refused_by_name_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], named: str
) -> None:
    first = write_run(tmp_path, "full", 64, lines(1, 2))
    second = write_run(tmp_path, "snapkv", 64, lines(1, 2), comparability=changed)
    assert re.search(named, refusal(capsys, first, second))


def test_runs_over_different_tasks_are_no_conflict(tmp_path: Path) -> None:
    write_run(tmp_path, "full", 64, lines(1, 2), comparability={"task_versions": {"lcc": 1}})
    write_run(tmp_path, "h2o", 64, lines(1, 2), comparability={"task_versions": {"trec": 7}})
    assert len(make_study([tmp_path]).runs) == 2


def test_two_models_are_refused_naming_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, records=lines(1))
    write_run(tmp_path, records=lines(1), model="other")
    error = refusal(capsys, tmp_path)
    assert "tiny" in error and "other" in error and "one model" in error


def test_bad_arguments_are_one_line(study_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "h2o" in refusal(capsys, study_folder, "--baseline", "snapvk")
    assert "--resamples 10" in refusal(capsys, study_folder, "--resamples", "10")
    assert "--wandb" in refusal(capsys, study_folder, "--wandb", "perhaps")
    (broken := study_folder / "file").write_text("")
    assert "no such folder" in refusal(capsys, broken)


def test_a_damaged_metrics_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, records=lines(1))
    (path / "metrics.json").write_text("{")
    assert "metrics.json" in refusal(capsys, tmp_path)


def test_options_that_differ_become_part_of_the_name(tmp_path: Path) -> None:
    write_run(tmp_path, "mine", 64, lines(1, 2), options={"kernel": 7, "window": 32, "pool": None})
    write_run(tmp_path, "mine", 64, lines(1, 2), options={"kernel": 1, "window": 32, "pool": True})
    labels = {run.label for run in make_study([tmp_path]).runs}
    assert labels == {"mine kernel=7 pool=null", "mine kernel=1 pool=true"}


def test_defaults_in_conf_stay_unnamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf/policy").mkdir(parents=True)
    (tmp_path / "conf/policy/snapkv.yaml").write_text("name: snapkv\nkernel: 7\nwindow: 32\n")
    monkeypatch.setattr("src.compare.runs.CONF", tmp_path / "conf")
    runs = tmp_path / "runs"
    write_run(runs, "snapkv", 64, lines(1, 2), options={"kernel": 7, "window": 32})
    write_run(runs, "snapkv", 64, lines(1, 2), options={"kernel": 1, "window": 32})
    study = make_study([runs])
    assert study.labels == ["snapkv", "snapkv kernel=1"] and study.baseline == "snapkv"


def test_other_settings_tell_equal_cells_apart_or_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "random", 64, lines(1, 2), seed=0)
    write_run(tmp_path, "random", 64, lines(3, 4), seed=1)
    assert make_study([tmp_path]).labels == ["random seed=0", "random seed=1"]
    write_run(tmp_path / "copy", "random", 64, lines(1, 2), seed=0)
    with pytest.raises(InputError, match="there twice"):
        make_study([tmp_path])


def test_the_full_cache_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path, "full", 64, lines(1, 2))
    larger = write_run(tmp_path, "full", 128, lines(1, 2, 3))
    study = make_study([tmp_path])
    assert [run.folder for run in study.runs] == [larger.resolve()] and "left out" in study.warnings[0]


def test_fractions_and_entries_are_ordered_and_shown_as_such(tmp_path: Path) -> None:
    for budget in (512, 0.25, 64, 0.5):
        write_run(tmp_path, "snapkv", budget, lines(1, 2, budget=budget))
    analysis = analyse(make_study([tmp_path]), resamples=1000)
    assert [row[1].text for row in scores_table(analysis).rows] == ["25 %", "50 %", "64", "512"]
    assert len(make_figures(analysis)["score_vs_budget"].axes) == 2  # two units, two panels


# --- tables in their forms ---

NASTY = Table(
    "x",
    "50% of A_b & <script>",
    (Column("policy|x", number=False), Column("score", "n=2")),
    (
        (TableCell("a_b|c*"), TableCell("−1.5 [−2, 3]", -1.5, (-2, 3), bold=True)),
        (TableCell("$x^2 #"), TableCell("–", float("nan"))),
    ),
    frozenset({1}),
)


def test_markdown_escapes_and_aligns() -> None:
    text = markdown(NASTY)
    assert r"| a\_b\|c\* | **−1.5 \[−2, 3\]** |" in text and r"\<script\>" in text
    assert "|---|---:|" in text


def test_latex_is_booktabs_and_escaped() -> None:
    text = latex(NASTY)
    assert r"a\_b\textbar{}c* & \textbf{$-$1.5 [$-$2, 3]} \\" in text
    assert r"\$x\textasciicircum{}2 \# & -- \\" in text and r"50\% of A\_b \& \textless{}script" in text
    assert text.count("\\midrule") == 2 and "\\toprule" in text and "\\bottomrule" in text


def test_csv_holds_full_numbers_and_bounds() -> None:
    rows = list(csv.reader(comma_separated(NASTY).splitlines()))
    assert rows == [
        ["policy|x", "score", "score low", "score high"],
        ["a_b|c*", "-1.5", "-2", "3"],
        ["$x^2 #", "", "", ""],
    ]


# --- figures, samples, words ---


def test_pareto_front() -> None:
    assert pareto_front([(4, 50), (1, 10), (2, 9), (2, 30), (3, 30)]) == [(1, 10), (2, 30), (4, 50)]


def test_figures_are_labelled_and_distinct_without_colour(study_folder: Path) -> None:
    study = make_study([study_folder])
    figures = make_figures(analyse(study, resamples=1000), retention_maps(study)[0])
    assert set(figures) == {
        "score_vs_budget", "score_vs_bytes", "differences", "fidelity_vs_budget", "retention",
    }  # fmt: skip
    axes = figures["score_vs_budget"].axes[0]
    assert "entries" in axes.get_xlabel() and "score" in axes.get_ylabel()
    lines_ = [line for line in axes.get_lines() if line.get_marker() not in ("None", "")]
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in lines_}) == len(lines_) == 4
    assert "MiB" in figures["score_vs_bytes"].axes[0].get_xlabel()
    assert "n = 18" in figures["score_vs_budget"].get_suptitle()


def test_retention_maps_show_shares_of_positions(study_folder: Path) -> None:
    study = make_study([study_folder])
    maps, warnings = retention_maps(study)
    assert not warnings and len(maps) == 8 and maps[1].shares.shape == (6, 64) and maps[1].n == 18
    column = study.column("h2o", 64)
    assert column is not None and maps[column].shares[:, -1].min() == 1  # the recent window
    assert maps[column].shares.mean() == pytest.approx(64 / 400, rel=0.05)
    assert maps[column].shares[:, :16].mean() > 3 * maps[column].shares[:, 32:48].mean()


def test_an_unreadable_retention_file_is_a_warning(tmp_path: Path) -> None:
    path = write_run(tmp_path, records=lines(1, 2))
    (path / "retention.npz").write_bytes(b"old")
    maps, warnings = retention_maps(make_study([tmp_path]))
    assert not maps and "snapkv at 64" in warnings[0]


def test_the_widest_spread_comes_first_and_equal_answers_are_joined(tmp_path: Path) -> None:
    write_run(tmp_path, "full", 64, lines(100, 90, 50))
    write_run(tmp_path, "h2o", 64, lines(100, 0, 40))
    write_run(tmp_path, "snapkv", 64, lines(100, 0, None))
    found = contrasts(make_study([tmp_path]))
    assert [c.key[1] for c in found] == ["qasper-001", "qasper-002"]  # no spread on the first sample
    first = [(a.text, a.score, [r.label for r in a.runs]) for a in found[0].answers]
    assert first == [("answer 1", 90, ["full"]), ("something else", 0, ["h2o", "snapkv"])]
    assert found[1].answers[-1].error == "out of memory"


def test_the_summary_says_what_the_numbers_say(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(60, 90, 20)
    write_run(tmp_path, "full", 64, lines(*base))
    write_run(tmp_path, "snapkv", 64, lines(*(base - 10 + generator.normal(0, 2, 20))))
    write_run(tmp_path, "h2o", 64, lines(*(base - 30 + generator.normal(0, 2, 20))))
    write_run(tmp_path, "ahakv", 64, lines(*(base - 4 + generator.normal(0, 2, 20))))
    write_run(tmp_path, "snapkv", 128, lines(*(base + generator.normal(0, 2, 20)), budget=128))
    text = " ".join(summary(analyse(make_study([tmp_path]), resamples=2000)))
    assert "the best is ahakv (our reconstruction)" in text
    assert "Clearly better than snapkv (Holm-corrected p < 0.05): ahakv (our reconstruction) at 64." in text
    assert "Clearly worse than snapkv (Holm-corrected p < 0.05): h2o at 64." in text
    assert "smallest cache without a clear loss is snapkv at 128 (its interval still allows a loss" in text
    assert re.search(r"largest loss on one task: qasper falls from [\d.]+ to [\d.]+ under h2o at 64", text)


def test_the_summary_claims_nothing_from_one_sample_per_task(tmp_path: Path) -> None:
    for policy in ("full", "snapkv", "h2o"):
        write_run(tmp_path, policy, 64, [*lines(50), *lines(70, task="trec")])
    text = " ".join(summary(analyse(make_study([tmp_path]), resamples=1000)))
    assert "the best are equally h2o and snapkv with 60.0" in text
    assert "too few samples for an interval" in text and "Too few samples to judge any loss" in text
    assert "without a clear loss" not in text and "nan" not in text


def test_notes_tell_growth_and_failures(tmp_path: Path) -> None:
    write_run(tmp_path, "full", 64, lines(1, 2))
    write_run(tmp_path, "snapkv", 64, lines(1, None), options={"kernel": 1})
    write_run(tmp_path, "h2o", 64, lines(1, 2, kv_bytes_peak=64 * 6144))
    write_run(tmp_path, "tova", 512, lines(1, 2, budget=512))
    rows = {row.run.policy: row for row in analyse(make_study([tmp_path]), resamples=1000).rows}
    told = " ".join(notes([rows["snapkv"]]))
    assert "grows" in told and "111 %" in told and "Options: kernel=1" in told and "out of memory" in told
    assert "stays within its budget" in " ".join(notes([rows["h2o"]]))
    assert "nothing was evicted, in: 2 of 2 samples" in " ".join(notes([rows["tova"]]))


# --- the page ---


def test_the_page_asks_nothing_of_the_network(report: Path) -> None:
    text = report.read_text()
    outside = re.findall(r'(?:src|href|action)="(?!#|data:)([^"]*)"', text)
    assert outside == [] and "@import" not in text and "<link" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_ids_on_the_page_are_unique_and_links_lead_somewhere(report: Path) -> None:
    text = report.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


def test_the_page_escapes_what_models_and_data_say(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    for policy, score in (("full", 100), ("snapkv", 0)):
        line = record("t<b>", 0, score, 64, prediction=f"{policy} {evil}", answers=[evil], id=f'"{evil}')
        write_run(tmp_path, policy, 64, [line, record("qasper", 1, None, 64, error=evil)], options={"o": evil})
    study = make_study([tmp_path])
    analysis = analyse(study, resamples=1000)
    text = page(analysis, make_tables(analysis), {}, contrasts(study), [evil])
    assert "<script>alert" not in text and "<img" not in text and "t<b>" not in text
    assert text.count("<script>") == 1 and "&lt;script&gt;alert(1)" in text


def test_every_file_is_written_and_the_last_line_is_the_page(
    study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(study_folder), "--out", str(tmp_path), "--resamples", "1000"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    assert "Averages and paired differences" in out and "snapkv" in out
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    stems = ("scores", "comparison", "memory", "fidelity", "retention", "tasks")
    assert {f"tables/{stem}.{ending}" for stem in stems for ending in ("md", "csv", "tex")} <= names
    assert {"figures/score_vs_budget.png", "figures/retention.pdf", "report.json"} <= names
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert len(numbers["runs"]) == 9 and numbers["runs"][0]["difference_to_full"] is None
    rows = list(csv.DictReader((tmp_path / "tables/tasks.csv").open()))
    assert len(rows) == 9 * len(METRICS) and rows[0]["n"] == "6"


def test_the_report_folder_lies_beside_the_runs_and_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path, records=lines(1, 2))
    path, _, _ = write_report([tmp_path], resamples=1000)
    assert path == run.resolve().parent / "report" / "report.html"
    assert find_runs([tmp_path]) == ([run.resolve()], [])


def test_random_weights_are_announced(tmp_path: Path) -> None:
    write_run(tmp_path, records=lines(1, 2), comparability={"random_weights": True})
    assert any("random" in text for text in make_study([tmp_path]).warnings)


def test_what_two_policies_keep_in_common(tmp_path: Path) -> None:
    """Jaccard by hand: 0..3 against 2..5 of 8 positions share two of six."""
    for policy, first in (("h2o", 0), ("snapkv", 2)):
        positions = [[list(range(first, first + 4))] * 2] * 2  # layers, heads
        rows = [record("qasper", i, 1.0, 4, n=8) for i in range(3)]
        write_run(tmp_path, policy, 4, rows, kept=lambda _, found=positions: Kept(found))
    tables = write_report([tmp_path], tmp_path / "out", resamples=1000)[2]
    shared = next(t for t in tables if t.name == "overlap")
    assert [c.name for c in shared.columns] == ["policy", "budget", "h2o", "snapkv"]
    assert [[c.value for c in row[2:]] for row in shared.rows] == [
        [None, pytest.approx(100 / 3)],
        [pytest.approx(100 / 3), None],
    ]
    assert "What two policies keep in common" in (tmp_path / "out" / "report.html").read_text()
    write_run(tmp_path / "alone", "h2o", 4, [record("qasper", 0, 1.0, 4, n=8)])
    assert not any(t.name == "overlap" for t in write_report([tmp_path / "alone"], resamples=1000)[2])


def test_scores_beside_the_official_ones(tmp_path: Path) -> None:
    for policy, extra in (("full", 40.0), ("snapkv", 30.0)):
        rows = [record("qasper", i, 20.0, 64, extra_scores={"by_number": extra + i}) for i in range(3)]
        write_run(tmp_path, policy, 64, rows)
    tables = {table.name: table for table in make_tables(analyse(make_study([tmp_path]), 1000))}
    shown = tables["extra_scores"]
    assert [column.name for column in shown.columns] == ["policy", "budget", "qasper"]
    assert [row[2].value for row in shown.rows] == [41.0, 31.0]


def test_errors_by_layer_reach_metrics_and_report(tmp_path: Path) -> None:
    fidelity = [{"nll": 2.0, "kl": 0.1, "top1": 1.0, "output_error": [0.1, 0.3 + i]} for i in range(4)]
    write_run(tmp_path, "full", 64, [record("qasper", i, 20.0, 64, fidelity=f) for i, f in enumerate(fidelity)])
    study = make_study([tmp_path])
    assert study.runs[0].metrics["fidelity"]["output_error"] == [0.1, 1.8]
    assert analyse(study, 1000).rows[0].fidelity["output_error"].estimate == pytest.approx((0.1 + 1.8) / 2)


# --- bytes, ties, reconstructions ---


def test_tied_policies_have_their_own_bytes_interval_and_p(tmp_path: Path) -> None:
    size = {"kv_bytes_full": 1000}
    write_run(tmp_path, "full", 64, lines(90, 60, 30, kv_bytes=1000, bookkeeping_bytes=10, **size))
    write_run(tmp_path, "h2o", 64, lines(50, 50, 20, kv_bytes=100, bookkeeping_bytes=16, **size))
    write_run(tmp_path, "snapkv", 64, lines(60, 20, 40, kv_bytes=153, bookkeeping_bytes=0, **size))
    write_run(tmp_path, "tova", 64, lines(40, 40, 40, kv_bytes=100, bookkeeping_bytes=200, **size))
    analysis = analyse(make_study([tmp_path]), resamples=1000)
    (line,) = (text for text in summary(analysis) if text.startswith("At budget 64"))
    assert "h2o (11.6 % of the full cache's bytes, 1.6 of them bookkeeping)" in line
    assert "snapkv (15.3 % of the full cache's bytes, 0.0 of them bookkeeping)" in line
    assert "tova (30.0 % of the full cache's bytes, 20.0 of them bookkeeping)" in line
    for row in analysis.budgeted:  # equal averages, other samples' differences: other intervals
        assert row.full and f"[{number(row.full.interval.low)}, {number(row.full.interval.high)}]" in line
    assert ("Best budgeted: h2o at 64, the smallest of 3 equal", "40.0") in [tile[:2] for tile in headline(analysis)]
    assert ("Its cache memory", "11.6 %") in [tile[:2] for tile in headline(analysis)]


def test_memory_columns_are_totals_with_their_parts_beside_them(tmp_path: Path) -> None:
    half = {"kv_bytes_device": 50, "kv_bytes_host": 100, "codebook_bytes": 30}
    full = lines(90, kv_bytes=1000, kv_bytes_full=1000, bookkeeping_bytes=10)
    write_run(tmp_path, "full", 64, full)
    write_run(tmp_path, "ahakv", 64, lines(50, kv_bytes=146, kv_bytes_full=1000, bookkeeping_bytes=42))
    write_run(tmp_path, "split", 64, lines(50, kv_bytes=150, kv_bytes_full=1000, bookkeeping_bytes=20, **half))
    analysis = analyse(make_study([tmp_path]), resamples=1000)
    table = memory_table(analysis)
    names = [column.key or column.name for column in table.columns]
    found = {r[0].text: dict(zip(names, [cell.value for cell in r], strict=True)) for r in table.rows}
    parts = ("entries", "bookkeeping", "total", "total, % of full cache's entries")
    places = [names.index(name) for name in parts]
    assert places == [*range(places[0], places[0] + 4)]  # side by side
    mib = 2**20
    ours, split = ([found[name][part] for part in parts] for name in ("ahakv (our reconstruction)", "split"))
    assert ours == pytest.approx([146 / mib, 42 / mib, 188 / mib, 18.8])
    assert split == pytest.approx([150 / mib, 20 / mib, 170 / mib, 17.0])
    beside = [found["split"][name] for name in ("on the device", "with codebooks")]
    assert beside == pytest.approx([7.0, 10.0])  # both with the bookkeeping
    assert found["full"][parts[-1]] == pytest.approx(101.0)
    axes = make_figures(analysis)["score_vs_bytes"].axes[0]
    drawn = {line.get_label(): line.get_xdata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 1}
    assert drawn["ahakv (our reconstruction)"] == pytest.approx(188 / mib) and "bookkeeping" in axes.get_xlabel()
    metrics = json.loads((analysis.rows[1].run.folder / "metrics.json").read_text())["memory"]
    assert (metrics["total_bytes_mean"], metrics["total_ratio"]) == (188, 0.188)


def test_a_reconstruction_says_so_wherever_it_is_shown(report: Path, study_folder: Path) -> None:
    mark = "ahakv (our reconstruction)"
    out = report.parent
    page_text = report.read_text()
    assert mark in page_text and "the body of the paper could not be read" in page_text
    for name in ("scores", "comparison", "memory", "retention", "overlap"):
        assert mark in (out / "tables" / f"{name}.csv").read_text(), name
        assert mark in (out / "tables" / f"{name}.md").read_text(), name
    assert "snapkv (our" not in page_text
    runs = json.loads((out / "report.json").read_text())["runs"]
    assert {run["policy"] for run in runs if run["reconstruction"]} == {"ahakv"}
    study = make_study([study_folder])
    legend = make_figures(analyse(study, resamples=1000))["score_vs_budget"].legends[0]
    assert mark in [text.get_text() for text in legend.get_texts()]


def test_only_the_same_class_is_the_known_reconstruction(tmp_path: Path) -> None:
    """A user's policy of that name is his; what his own class says of itself is believed."""
    write_run(tmp_path, "ahakv", 64, lines(1, 2), options={"_target_": "mine.AhaKV"})
    run = write_run(tmp_path, "other", 64, lines(1, 2))
    metrics = json.loads((run / "metrics.json").read_text())
    write_metrics(run / "metrics.json", {**metrics, "reconstruction": "from a talk"})
    shown = [row.shown for row in make_study([tmp_path]).runs]
    assert shown == ["ahakv", "other (our reconstruction)"]


def test_pictures_say_how_many_samples_they_draw(tmp_path: Path) -> None:
    write_run(tmp_path, "full", 64, lines(*[50] * 120))
    keep = kept_positions("h2o", 64)
    write_run(tmp_path, "h2o", 64, lines(*[50] * 120), kept=keep)
    write_run(tmp_path, "snapkv", 64, lines(*[50] * 100, *[None] * 20), kept=lambda r: None if r["error"] else keep(r))
    study = make_study([tmp_path])
    maps, _ = retention_maps(study)
    figures = make_figures(analyse(study, resamples=1000), maps)
    drawn = sorted(found.n for found in maps.values())
    assert drawn[1] == 96 > drawn[0]
    assert f"n = {drawn[0]} to 96 samples" in figures["retention"].get_suptitle()
    assert "n = 100 to 120 samples" in figures["score_vs_budget"].get_suptitle()


# --- names from outside ---

HOSTILE = "=cmd|' /C calc'!A0\x1b[31m$x$ &amp; ~~a~~ #1 @user <b>`\ud800\u202e_^\\ http://e.org"


def test_hostile_names_do_nothing_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, "h2o", 64, [*lines(10, 20), *lines(30, task="+task\x1b]0;x\x07")])
    write_run(tmp_path, "full", 64, [*lines(40, 50), *lines(60, task="+task\x1b]0;x\x07")])
    metrics = json.loads((run / "metrics.json").read_text())
    for policy in (HOSTILE, "../../../x", "n" * 300, "@SUM(1)", "\t=1", "-1+1", "[red]"):
        (run / "metrics.json").write_text(json.dumps({**metrics, "policy": policy}))
        assert main([str(tmp_path), "--resamples", "1000"]) == 0
        printed = capsys.readouterr()
        said = printed.out + printed.err
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said)
        out = Path(printed.out.splitlines()[-1].removeprefix("report: ")).parent
        for path in (out / "tables").glob("*.csv"):
            for line in csv.reader(path.read_text().splitlines()):
                for cell in line:
                    assert not cell.startswith(("=", "+", "@", "\t")) and "\x1b" not in cell
                    assert not cell.startswith("-") or float(cell) < 0
    assert r"\x1b" in (out / "tables" / "scores.csv").read_text()  # shown: the task's name


def test_negative_numbers_stay_numbers_in_a_csv() -> None:
    columns = (Column("-name", number=False), Column("value"))
    table = Table(
        "x", "t", columns, ((TableCell("−2.5"), TableCell("−2.5", -2.5)), (TableCell("-x"), TableCell("3", 3)))
    )
    assert list(csv.reader(comma_separated(table).splitlines())) == [
        ["'-name", "value"], ["−2.5", "-2.5"], ["'-x", "3"],
    ]  # fmt: skip


def test_markdown_and_latex_take_no_orders() -> None:
    table = Table("x", "t", (Column("p", number=False),), ((TableCell(HOSTILE),), (TableCell("[1em]"),)))
    text = markdown(table)
    assert r"\$x\$ \&amp; \~\~a\~\~ \#<!-- -->1 \@<!-- -->user \<b\>\`\\ud800\\u202e" in text
    assert r"\\x1b\[31m" in text and "http:<!-- -->//e.org" in text
    tex = latex(table)
    assert r"\$x\$ \&amp; \textasciitilde{}\textasciitilde{}a" in tex and r"\#1 @user" in tex
    assert "    {}[1em] \\\\" in tex and r"=cmd\textbar{}" in tex
