"""The studies' configs, the tables made from their runs, and the notebooks on both, from top to bottom.

One tiny random model runs every study once, with few samples: all numbers are noise, all code is real.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from hydra import compose
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from src.compare.intervals import bootstrap_intervals
from src.config.compose import composing, register_tasks
from src.config.settings import read_settings
from src.errors import InputError
from src.retention.store import Kept, kept_sample
from src.study import __main__ as reference
from src.study import lab
from src.study.collect import TABLES, collect
from src.study.retention_tables import DECILES, drifted, kept_figures, ratio_interval
from src.sweep import sweep
from tests.support.synthetic_runs import record, write_run
from tests.support.tiny import tiny, tiny_tokenizer

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.py"))
STUDIES = ("bias_study", "ahakv_ablation", "budget_curve")
BUDGET = 48


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three studies over two pocket tasks with a tiny model."""
    root = tmp_path_factory.mktemp("lab")
    tiny("llama", num_key_value_heads=1, num_hidden_layers=2).save_pretrained(root / "tiny")
    tiny_tokenizer().save_pretrained(root / "tiny")
    register_tasks()
    for study in STUDIES:
        overrides = [
            f"experiment={study}",
            "model=local",
            f"model.path={root}/tiny",
            "model.max_prompt_tokens=150",
            "tasks=pocket",
            "tasks.names=[needle,kv_lookup]",
            "limit=3",
            "max_new_tokens=4",
            f"budgets={[BUDGET, 64] if study == 'budget_curve' else [BUDGET]}",
            f"output_root={root}/results/{study}",
            "wandb.mode=disabled",
        ]
        with composing():
            cfg = compose("sweep", overrides=overrides)
        assert sweep(read_settings("sweep", cfg)) == 0
    return root / "results"


def execute(path: Path, **settings: Any) -> nbformat.NotebookNode:
    """Run a notebook from top to bottom in its own folder, with other values for its settings."""
    notebook = jupytext.read(path)
    for name, value in settings.items():
        lines = [line for cell in notebook.cells for line in cell.source.splitlines() if line.startswith(f"{name} = ")]
        for cell in notebook.cells:
            for line in lines:
                cell.source = cell.source.replace(line, f"{name} = {value!r}")
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def warned(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")


def figures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def of(number: int) -> Path:
    return NOTEBOOKS[number - 1]


def test_bias_notebook(root: Path) -> None:
    done = execute(of(1), ROOT=str(root), MIN_PROMPT=0)
    said = printed(done)
    assert "bias_study: tiny, 15 cells from run folders in" in said
    assert "no sink: slope of S_j on ln(n/j) = 1.0" in said or "= 0.9" in said
    claims = ("prefers the beginning", "takes away H2O's", "preference for either end", "where the answer will look")
    for claim in (*claims, "AhaKV scores higher than h2o", "than snapkv"):
        assert claim in said
    assert "h2o: ln(score) falls with ln(position) at a slope of " in said and "exchangeable logits -" in said
    assert figures(done) == 4
    assert warned(done) == ""


def test_ablation_notebook(root: Path) -> None:
    done = execute(of(2), ROOT=str(root))
    for part in ("recent_accumulation", "step_gain", "value_prior"):
        assert f"{part} helps: " in printed(done)
    assert figures(done) == 2
    assert warned(done) == ""


def test_budget_notebook_and_fallback_to_the_study_tables(root: Path, tmp_path: Path) -> None:
    from_runs = execute(of(3), ROOT=str(root))
    assert figures(from_runs) == 2
    assert "budget 64: oracle answer=reference KL" in printed(from_runs)
    assert warned(from_runs) == ""
    command = "python -m src.sweep experiment=budget_curve"
    arguments = [str(root / "budget_curve"), "--out", str(tmp_path / "study" / "budget_curve")]
    assert reference.main([*arguments, "--command", command]) == 0
    from_tables = execute(of(3), ROOT=str(tmp_path))
    said = printed(from_tables)
    assert f"the committed study tables in {tmp_path / 'study' / 'budget_curve'}, because" in said
    assert said.splitlines()[1:] == printed(from_runs).splitlines()[1:]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_on_the_committed_tables(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a reader without results sees; every figure says what it shows, in units and with n, without colour."""
    (tmp_path / "study").symlink_to(NOTEBOOKS[0].parents[1] / "results" / "study")
    drawn: list[tuple[str, Figure]] = []
    monkeypatch.setattr(lab, "save", lambda figure, name: drawn.append((name, figure)))
    plt.switch_backend("Agg")
    source = of(number).read_text().replace("ROOT = None", f"ROOT = {str(tmp_path)!r}")
    with matplotlib.rc_context():
        exec(compile(source, of(number), "exec"), {"__name__": "notebook"})
    said = capsys.readouterr().out
    if number < 4:  # the last one needs no results
        assert "from the committed study tables" in said and "smollm2-135m" in said
    assert len(drawn) == {1: 4, 2: 2, 3: 2, 4: 1}[number]
    for name, figure in drawn:
        figure.draw_without_rendering()
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert any(re.search(r"n = [\d,]+", text) for text in texts), name
        for axes in (axes for axes in figure.axes if axes.get_visible()):
            assert axes.get_xlabel() or figure.get_supxlabel(), name
            shared = axes.get_shared_y_axes().get_siblings(axes)
            names = [label.get_text() for each in shared for label in each.get_yticklabels()]
            assert axes.get_ylabel() or figure.get_supylabel() or any(map(str.isalpha, "".join(names))), name
            greys = [to_rgb(line.get_color()) for line in axes.get_lines()]
            assert all(red == green == blue for red, green, blue in greys), name
    plt.close("all")


def test_policy_notebook() -> None:
    done = execute(of(4))
    assert figures(done) == 1
    assert warned(done) == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pairs_are_in_step_and_without_outputs(path: Path) -> None:
    text, paired = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in text.cells] == [(c.cell_type, c.source) for c in paired.cells], (
        "run: make notebooks"
    )
    assert all(not c.outputs and c.execution_count is None for c in paired.cells if c.cell_type == "code")


# --- the tables ---


def test_tables_agree_with_metrics_json(root: Path) -> None:
    tables, study = collect([root / "bias_study"], baseline="ahakv")
    cells = tables["cells"].set_index(["policy", "options", "task"])
    for run in study.runs:
        options = run.label.removeprefix(run.policy).strip()
        row = cells.loc[(run.policy, options, "all")]
        assert row["score"] == pytest.approx(run.metrics["average"], abs=1e-3)
        assert row["kl"] == pytest.approx(run.metrics["fidelity"]["kl"], abs=1e-5)
        assert row["kv_bytes"] == pytest.approx(run.metrics["memory"]["kv_bytes_mean"], abs=0.1)
        for task, found in run.metrics["tasks"].items():
            assert cells.loc[(run.policy, options, task), "score"] == pytest.approx(found["score"], abs=1e-3)
            assert cells.loc[(run.policy, options, task), "n"] == found["n"]
        kept = tables["retention"]
        kept = kept[(kept["policy"] == run.policy) & (kept["options"] == options)]
        for part, recorded in (("all", run.metrics["retention"]), ("heavy", run.metrics["retention"]["heavy"])):
            mine = kept[kept["part"] == part].set_index("measure")["value"]
            if run.full or recorded is None:
                assert mine.empty
                continue
            assert mine[list(DECILES)].to_numpy() == pytest.approx(recorded["decile_shares"], abs=2e-5)
            assert mine["mean_position"] == pytest.approx(recorded["mean_position"], abs=2e-5)
            if part == "all":
                assert mine["drift"] == pytest.approx(recorded["drift"], abs=2e-5)
                assert ("needle" in mine) == ("needle" in recorded)  # these prompts are cut: mostly without
                assert ("score_slope" in mine) == ("score_slope" in recorded)
                if "score_slope" in recorded:
                    assert mine["score_slope"] == pytest.approx(recorded["score_slope"]["mean"], abs=2e-5)
            if recorded["first_to_last_decile"] is not None:
                assert mine["first_to_last"] == pytest.approx(recorded["first_to_last_decile"], rel=1e-3)
    octaves = tables["octaves"]
    assert set(octaves["policy"]) == {"random", "h2o", "vatp", "snapkv", "ahakv"}  # the policies with a score
    h2o = octaves[(octaves["policy"] == "h2o") & (octaves["options"] == "")].set_index("first")
    records = next(run for run in study.runs if run.label == "h2o").records.values()
    assert h2o.index.tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert h2o.loc[4, "value"] == pytest.approx(
        np.mean([np.array(r.measures["score_by_octave"])[:, 2] for r in records])
    )
    gaps = tables["differences"].set_index(["policy", "options", "measure"])
    for name in ("score", "kl", "nll"):
        expected = cells.loc[("h2o", "", "all"), name] - cells.loc[("ahakv", "", "all"), name]
        assert gaps.loc[("h2o", "", name), "difference"] == pytest.approx(expected, abs=1e-9)
        assert gaps.loc[("h2o", "", name), "against"] == "ahakv"
    assert ("ahakv", "", "kl") not in gaps.index and ("full", "", "kl") not in gaps.index


def test_written_tables_come_back_and_say_how_they_were_made(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "study" / "ahakv_ablation"
    arguments = [str(root / "ahakv_ablation"), "--out", str(out), "--baseline", "ahakv", "--command", "python -m x a=1"]
    assert reference.main(arguments) == 0
    again = lab.load("ahakv_ablation", tmp_path)
    direct = lab.load("ahakv_ablation", root, baseline="ahakv")
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(again, name), getattr(direct, name), check_dtype=False, rtol=1e-4)
    text = (out / "README.md").read_text()
    assert "    python -m x a=1\n    python -m src.study" in text
    assert "model: tiny" in text and "prompts: " in text and "random_weights: False" in text
    assert {"n", "low", "high"} <= set(again.retention) and "" in set(again.cells["options"])


def test_short_prompts_are_left_out(tmp_path: Path) -> None:
    rows = [record("qasper", i, float(i), 64, n=100 + i) for i in range(8)]
    write_run(tmp_path, "snapkv", 64, rows)
    cells = collect([tmp_path], min_prompt=105)[0]["cells"].set_index("task")
    assert cells.loc["all", "n"] == 3
    assert cells.loc["all", "score"] == pytest.approx(6)
    assert cells.loc["all", "prompt_tokens"] == pytest.approx(106)
    with pytest.raises(InputError, match="--min-prompt 200: no sample is that long; the longest has 107"):
        collect([tmp_path], min_prompt=200)


def test_kept_figures_by_hand() -> None:
    """20 positions, one head, kept 0, 1, 3, 10 and the last four: heavy is the first 16, deciles of 1.6."""
    sample = kept_sample(("t", "i", "h"), 20, Kept([[[0, 1, 3, 10, 16, 17, 18, 19]], [[0, 1, 3, 10, 16, 17, 18, 19]]]))
    everything = kept_figures(sample, "all")
    assert everything[:10] == pytest.approx([2 / 8, 1 / 8, 0, 0, 0, 1 / 8, 0, 0, 2 / 8, 2 / 8])
    assert everything[10] == pytest.approx(sum(p + 0.5 for p in (0, 1, 3, 10, 16, 17, 18, 19)) / 8 / 20)
    heavy = kept_figures(sample, "heavy")  # 10 p // 16: 0, 0, 1, 6
    assert heavy[:10] == pytest.approx([0.5, 0.25, 0, 0, 0, 0, 0.25, 0, 0, 0])
    assert heavy[10] == pytest.approx((0.5 + 1.5 + 3.5 + 10.5) / 4 / 16)
    after, end = [[[0, 1, 3, 10]], [[0, 1, 3, 10]]], [[[0, 1, 3, 25]], [[0, 1, 3, 10]]]
    assert drifted(kept_sample(("t", "i", "h"), 20, Kept(after, end))) == pytest.approx((1 / 4 + 0) / 2)
    recent_only = kept_sample(("t", "i", "h"), 20, Kept([[[18, 19]]]))
    assert np.isnan(kept_figures(recent_only, "heavy")).all()


def test_ratio_interval() -> None:
    ones = np.ones(6)
    assert ratio_interval(3 * ones, ones) == pytest.approx((3, 3, 3))
    top = np.array([1.0, 1, 1, 3, 3, 3])
    value, low, high = ratio_interval(top, ones)
    assert value == 2  # 5 draws with replacement: all of them 1 has probability 1/32, beyond the corrected 2.5 %
    assert (low, high) == (1, 3)
    assert ratio_interval(top, ones * 0)[0] == np.inf
    assert np.isnan(ratio_interval(top[:4], ones[:4])[1:]).all()
    # Many samples: about what the normal approximation of the log ratio says.
    draw = np.random.default_rng(0)
    a, b = draw.gamma(4, 1, 400), draw.gamma(4, 1, 400)
    value, low, high = ratio_interval(a, b)
    spread = 1.96 * np.sqrt((a.std() / a.mean()) ** 2 / 400 + (b.std() / b.mean()) ** 2 / 400)
    assert (low, high) == pytest.approx((value * np.exp(-spread), value * np.exp(spread)), rel=0.02)


# --- what is refused ---


def rows(n: int = 4) -> list[dict[str, Any]]:
    return [record("qasper", i, 50.0 + i, 64) for i in range(n)]


def test_nothing_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no results: neither .* nor .*python -m src.sweep experiment=bias_study"):
        lab.load("bias_study", tmp_path)


def test_several_models_are_refused_and_named(tmp_path: Path) -> None:
    for model in ("llama", "mistral"):
        write_run(tmp_path / "bias_study" / model, "h2o", 64, rows(), model=model)
    with pytest.raises(InputError, match=r"llama.*mistral"):
        lab.load("bias_study", tmp_path)


def test_several_models_in_reference_tables_are_refused(tmp_path: Path) -> None:
    for model in ("llama", "mistral"):
        write_run(tmp_path / model, "h2o", 64, rows(), model=model)
        out = tmp_path / "study" / f"{model}_study"
        assert reference.main([str(tmp_path / model), "--out", str(out), "--command", "x"]) == 0
    merged = tmp_path / "study" / "both"
    shutil.copytree(tmp_path / "study" / "llama_study", merged)
    more = (tmp_path / "study" / "mistral_study" / "cells.csv").read_text().splitlines()[1:]
    (merged / "cells.csv").write_text((merged / "cells.csv").read_text() + "\n".join(more) + "\n")
    with pytest.raises(InputError, match=r"different models \(llama, mistral\) in one comparison"):
        lab.load("both", tmp_path)


def test_several_budgets_are_refused_and_named(tmp_path: Path) -> None:
    for budget in (64, 128):
        write_run(tmp_path / "bias_study", "h2o", budget, rows())
    tables = lab.load("bias_study", tmp_path)
    with pytest.raises(InputError, match=r"different budgets \(64, 128\) in one comparison; choose BUDGET"):
        lab.at_budget(tables)
    with pytest.raises(InputError, match="BUDGET=99: not in these results; valid: 64, 128"):
        lab.at_budget(tables, 99)
    assert set(lab.at_budget(tables, 128).cells["budget"]) == {128}


def test_the_notebook_says_so_too(tmp_path: Path) -> None:
    for budget in (64, 128):
        write_run(tmp_path / "bias_study", "ahakv", budget, rows())
    with pytest.raises(CellExecutionError, match=r"different budgets \(64, 128\)"):
        execute(of(1), ROOT=str(tmp_path), MIN_PROMPT=0)


def test_older_retention_files_are_named(tmp_path: Path) -> None:
    kept: Callable[[Any], Kept] = lambda _: Kept([[[0, 1, 5]]])  # noqa: E731
    folder = write_run(tmp_path / "bias_study", "h2o", 64, rows(), kept=kept)
    file = dict(np.load(folder / "retention.npz"))
    np.savez(folder / "retention.npz", **(file | {"schema": np.asarray(0)}))
    with pytest.raises(InputError, match=r"retention schema 0, this version reads schema 1"):
        lab.load("bias_study", tmp_path)


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([str(tmp_path), "--out", str(tmp_path / "x")], [str(tmp_path / "no"), "--out", "x"]):
        assert reference.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    write_run(tmp_path, "h2o", 64, rows())
    (tmp_path / "taken").write_text("")
    assert reference.main([str(tmp_path), "--out", str(tmp_path / "taken"), "--command", "x"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_verdicts() -> None:
    assert lab.apart(2, 3, 1, 1) is True
    assert lab.apart(0.5, 0.9, 1, 1) is False
    assert lab.apart(0.5, 1.5, 1, 1) is None
    assert lab.verdict("It rains", False, "0 mm") == "It rains: does NOT hold here (0 mm)."
    assert "cannot be decided" in lab.verdict("It rains", None, "no gauge")


def test_the_intervals_are_those_of_the_statistics_module(root: Path) -> None:
    tables, study = collect([root / "bias_study"])
    column = next(i for i, run in enumerate(study.runs) if run.label == "snapkv")
    interval = bootstrap_intervals(study.scores[:, [column]], study.task_of)[0]
    row = tables["cells"].query("policy == 'snapkv' and options == '' and task == 'all'").iloc[0]
    assert (row["score_low"], row["score_high"]) == pytest.approx((interval.low, interval.high))


def test_what_a_notebook_lacks_is_named(root: Path) -> None:
    tables = lab.load("bias_study", root)
    lab.need(tables, "h2o")
    with pytest.raises(InputError, match=r"bias_study: no run of peak in run folders in .*; this notebook needs them"):
        lab.need(tables, "h2o", "peak")
    blind = replace(tables, cells=tables.cells.assign(kl=np.nan))
    with pytest.raises(InputError, match="lack fidelity; run them with fidelity=true"):
        lab.need(blind, "h2o")
