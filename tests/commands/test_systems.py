"""SCOPE and HCAttention as users run them: codebooks, sweep, run, report, pictures, bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from src.compare.runs import label_runs, load_run
from src.records.files import load_records
from src.report import __main__ as report
from src.report import kept_over_time
from src.retention.trace import Trace, trace_path
from tests.support.cli import call, folders, lines, metrics, predictions

ENTRY = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32


@pytest.fixture(scope="module")
def common(model_folder: Path) -> list[str]:
    return [
        "model=local",
        f"model.path={model_folder}",
        "model.max_prompt_tokens=200",
        "tasks=needle",
        "limit=2",
        "max_new_tokens=10",
        "wandb.mode=disabled",
    ]


@pytest.fixture(scope="module")
def codebooks(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("codebooks") / "tiny.safetensors"
    model = ["model=local", f"model.path={model_folder}", "model.max_prompt_tokens=200"]
    fit = ["groups=4", "centroids=8", "samples=1", "sample_tokens=200", "jobs=1", f"output={file}"]
    done = call("calibrate", *model, *fit)
    assert done.code == 0 and file.exists(), done.err
    return file


def grid(codebooks: Path) -> str:
    quantised = f"{{name: hcattention, groups: 4, centroids: 8, codebooks: {codebooks}, tau: 0.5}}"
    return f"policies=[full,h2o,scope_slide,{{name: scope_slide, score: current}},{quantised}]"


@pytest.fixture(scope="module")
def swept(common: list[str], codebooks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("swept")
    more = ["budgets=[48]", "fidelity=true", "kept_over_time=2", f"output_root={root}"]
    done = call("sweep", *common, grid(codebooks), *more)
    assert done.code == 0, done.err
    return root


def test_cells_of_a_sweep_are_the_runs_alone(common: list[str], codebooks: Path, swept: Path, tmp_path: Path) -> None:
    for policy in (
        ["policy=scope_slide", "budget=48"],
        [
            "policy=hcattention",
            "policy.groups=4",
            "policy.centroids=8",
            f"policy.codebooks={codebooks}",
            "policy.tau=0.5",
        ],
    ):
        done = call("run", *common, *policy, "lanes=1", f"output_root={tmp_path}")
        assert done.code == 0, done.err
        assert predictions(done.folder) == predictions(folders(swept)[done.folder.name])


def test_bytes_are_counted_per_device(swept: Path, codebooks: Path) -> None:
    found = next(path for name, path in folders(swept).items() if name.startswith("hcattention"))
    for record in lines(found):
        n = record["prompt_tokens"]
        assert record["kv_bytes_device"] == n * 2 * 2 * 4 * 2  # layers, KV heads, groups, 16-bit indices
        assert record["kv_bytes_host"] == n * ENTRY // 2
        assert 0 < record["chosen_share"] < 1
    memory = metrics(found)["memory"]
    assert memory["codebook_bytes"] == 2 * 2 * 4 * 8 * 4 * 4  # layers, KV heads, groups, centroids, 16 / 4, float32
    full = memory["kv_bytes_full_mean"]
    assert memory["device_ratio"] == pytest.approx(4 * 2 / (2 * 16 * 4), abs=1e-6)
    assert memory["device_ratio_with_codebooks"] == pytest.approx(
        memory["device_ratio"] + memory["codebook_bytes"] / full, abs=1e-5
    )


def test_chosen_tokens_that_are_gone_are_computed_again(common: list[str], codebooks: Path, tmp_path: Path) -> None:
    policy = ["policy=hcattention", "policy.groups=4", "policy.centroids=8", f"policy.codebooks={codebooks}"]
    arguments = [*common, *policy, "policy.tau=0.5", f"output_root={tmp_path}"]
    done = call("run", *arguments)
    before = [(r.id, r.prediction, r.score) for r in load_records(done.folder)]
    first, second, *_ = sorted((done.folder / "chosen").glob("*.npz"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-40])
    assert "2 finished samples ran again" in call("run", *arguments).err
    assert [(r.id, r.prediction, r.score) for r in load_records(done.folder)] == before
    for path in (first, second):
        with np.load(path) as found:
            assert sorted(found) == ["picks", "positions", "prompt_tokens", "steps"]
    assert "ran again" not in call("run", *arguments).err


def test_a_budget_in_two_parts(common: list[str], tmp_path: Path) -> None:
    both = "{prompt: 40, decode: 6}"
    done = call("run", *common, "policy=scope_adaptive", f"budget={both}", f"output_root={tmp_path}")
    assert done.code == 0, done.err
    assert done.folder.name.startswith("scope_adaptive-40+6-")
    config = yaml.safe_load((done.folder / "config.yaml").read_text())
    assert config["budget"] == {"prompt": 40, "decode": 6} and "decode_budget" not in config["policy"]
    assert label_runs([load_run(done.folder)])[0].label == "scope_adaptive decode_budget=6"
    done = call("sweep", *common, "policies=[scope_slide]", f"budgets=[{both},50]", f"output_root={tmp_path}")
    assert done.code == 0, done.err
    assert len(folders(tmp_path)) == 3
    for record in lines(next(path for name, path in folders(tmp_path).items() if "slide-40+6" in name)):
        assert record["kept"] == {"prompt": 40, "end": 40 + min(record["new_tokens"] - 1, 6)}


def test_in_the_report(swept: Path, tmp_path: Path) -> None:
    assert report.main([str(swept), "--out", str(tmp_path / "all"), "--resamples", "1000"]) == 0
    page = (tmp_path / "all" / "report.html").read_text()
    assert "scope_slide score=current" in page and "hcattention" in page
    assert "What is cached as the output grows" in page and "Positions kept over time" in page
    assert "score slope" in page
    assert (tmp_path / "all" / "figures" / "kept_over_time.png").exists()


def test_chosen_tokens_over_time(swept: Path) -> None:
    """Of a policy that keeps everything and chooses, the trace holds what it attended to."""
    found = next(path for name, path in folders(swept).items() if name.startswith("hcattention"))
    for record in lines(found):
        trace = Trace.load(trace_path(found, record["task"], record["id"]))
        assert trace.steps == list(range(2, record["new_tokens"], 2))  # at 0 nothing had been chosen yet
        for step, shares in zip(trace.steps, trace.shares, strict=True):
            assert np.sum(shares) * trace.width == pytest.approx(record["chosen_by_step"][step - 1], abs=0.01)


def test_chosen_positions_by_layer_and_head(swept: Path) -> None:
    found = next(path for name, path in folders(swept).items() if name.startswith("hcattention"))
    for record in lines(found):
        with np.load(found / "chosen" / f"{record['task']}-{record['id']}.npz") as file:
            positions, picks = file["positions"], file["picks"]
            steps, n = int(file["steps"]), int(file["prompt_tokens"])
        assert positions.shape == picks.shape == (2, 2, n + steps) and n == record["prompt_tokens"]
        assert (positions == np.arange(n + steps)).all() and picks.min() >= 0
        assert picks[..., :n].max() <= steps * 2  # query heads of a KV head
        # chosen_by_step: means over layers and query heads, 2 x 4
        assert picks.sum() / 8 == pytest.approx(sum(record["chosen_by_step"]), abs=0.01 * steps)
    assert not any((path / "chosen").exists() for name, path in folders(swept).items() if not name.startswith("hc"))


def test_traces_can_be_asked_for_later(common: list[str], tmp_path: Path) -> None:
    command = ["run", *common, "policy=h2o", "budget=48", f"output_root={tmp_path}"]
    first = call(*command)
    assert first.code == 0 and not (first.folder / "kept_over_time").exists()
    answers = [r.prediction for r in load_records(first.folder)]
    for every, written in (
        (2, 4),
        (2, 4),
        (3, 2),
    ):  # once for each interval; a third line of a sample shortens the file
        done = call(*command, f"kept_over_time={every}")
        traces = [Trace.load(path) for path in (done.folder / "kept_over_time").glob("*.npz")]
        assert done.code == 0 and [trace.every for trace in traces] == [every, every]
        assert [r.prediction for r in load_records(done.folder)] == answers
        assert len((done.folder / "predictions.jsonl").read_text().splitlines()) == written
    assert call(*command, "overwrite=true").code == 0 and not (done.folder / "kept_over_time").exists()


def test_a_report_without_any_budget(swept: Path, tmp_path: Path) -> None:
    """HCAttention keeps every token: there is no curve over budgets to draw."""
    found = [path for name, path in folders(swept).items() if name.startswith(("full", "hcattention"))]
    assert len(found) == 2
    assert report.main([*map(str, found), "--out", str(tmp_path), "--resamples", "1000"]) == 0
    assert not (tmp_path / "figures" / "score_vs_budget.png").exists()


def test_the_kept_set_over_time(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [str(path) for name, path in folders(swept).items() if name.startswith(("h2o", "scope"))]
    assert len(found) == 3
    assert len(set(kept_over_time.names_of([Path(path) for path in found]))) == 3  # options tell them apart
    out = tmp_path / "kept.png"
    assert kept_over_time.main([str(out), *found]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert kept_over_time.main([str(out), *found, "--sample", "other"]) == 2
    assert "needle-needle-0-0" in capsys.readouterr().err
    for arguments in (
        [str(out), str(tmp_path)],
        [str(out)],
        [str(tmp_path / "x.foo"), *found],
        ["/proc/x.png", *found],
    ):
        assert kept_over_time.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no decode phase": (["policy=h2o", "budget={prompt: 40, decode: 8}"], ["budget=40+8", "one number"]),
    "no budget at all": (["policy=full", "budget={prompt: 40, decode: 8}"], ["budget=40+8", "one number"]),
    "a pool below its window": (
        ["policy=scope_slide", "budget={prompt: 8, decode: 8}"],
        ["budget.prompt=8", "9 or more"],
    ),
    "groups": (["policy=hcattention", "policy.groups=5"], ["groups=5", "head size 16", "1, 2, 4, 8, 16"]),
    "tau": (["policy=hcattention", "policy.tau=0"], ["tau=0", "(0, 1]"]),
    "no codebooks": (["policy=hcattention", "policy.groups=2", "policy.centroids=3"], ["src.calibrate", "groups=2"]),
    "a prompt policy that looks ahead": (
        ["policy=scope_slide", "budget=40", "policy.prompt={_target_: policies.oracle.Oracle}"],
        ["prompt=Oracle", "looks ahead"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, common: list[str], tmp_path: Path) -> None:
    overrides, words = REFUSED[case]
    done = call("run", *common, *overrides, f"output_root={tmp_path}")
    (shown,) = done.err.splitlines()
    assert done.code == 2 and shown.startswith("error: "), done.err
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize("setting", ["groups=abc", "samples=0", "jobs=0", "centroids=1"])
def test_codebook_settings_are_checked(setting: str, model_folder: Path) -> None:
    done = call("calibrate", "model=local", f"model.path={model_folder}", setting)
    (shown,) = done.err.splitlines()
    assert done.code == 2 and shown.startswith(f"error: {setting}"), done.err


def test_positions_of_a_context_are_relative_to_it(common: list[str], tmp_path: Path) -> None:
    """`prompt_scope=context`: the policy chose among the context's tokens, the question came later."""
    done = call("run", *common, "policy=streaming_llm", "budget=20", "prompt_scope=context", f"output_root={tmp_path}")
    assert done.code == 0, done.err
    for record in lines(done.folder):
        assert record["context_tokens"] < record["prompt_tokens"]
        assert record["decode_steps"] >= record["prompt_tokens"] - record["context_tokens"]
    found: dict[str, Any] = json.loads((done.folder / "metrics.json").read_text())["retention"]
    assert found["recent_mean"] == 16  # 20 entries, 4 of them sinks


def test_a_reader_beside_other_policies(common: list[str], tmp_path: Path) -> None:
    """Chosen tokens of what SnapKV keeps, where layers and heads hold differing numbers; named, recorded, traced."""
    cells = "{name: snapkv, window: 8, allocate: adakv, read: mass},{name: h2o, read: mass},{name: snapkv, window: 8}"
    more = ["budgets=[48]", "retention=positions", "kept_over_time=2", "fidelity=true", f"output_root={tmp_path}"]
    done = call("sweep", *common, f"policies=[full,{cells}]", *more)
    assert done.code == 0, done.err
    found = {name.rpartition("-48-")[0]: path for name, path in folders(tmp_path).items()}
    assert {"snapkv+adakv+read_mass", "h2o+read_mass", "snapkv"} <= set(found)
    assert not (found["snapkv"] / "chosen").exists()
    for name in ("snapkv+adakv+read_mass", "h2o+read_mass"):
        for record in lines(found[name]):
            assert 0 < record["chosen_share"] < 1 and record["fidelity"]["kl"] > 0
            with np.load(found[name] / "chosen" / f"{record['task']}-{record['id']}.npz") as file:
                positions, picks = file["positions"], file["picks"]
            assert positions.shape == picks.shape and (picks[positions < 0] == 0).all()
            held = (positions >= 0).sum(-1)
            assert (len(np.unique(held)) > 1) == ("adakv" in name)
            if "snapkv" in name:  # nothing that was chosen has left
                assert picks.sum() / 8 == pytest.approx(sum(record["chosen_by_step"]), abs=0.01 * 10)
            trace = Trace.load(trace_path(found[name], record["task"], record["id"]))
            for step, shares in zip(trace.steps, trace.shares, strict=True):
                assert 0 < np.sum(shares) * trace.width <= record["chosen_by_step"][step - 1] + 0.01
    assert "ran again" not in call("sweep", *common, f"policies=[full,{cells}]", *more).err
