"""`python -m src.run`: what it writes, that it is right, reproducible, and what Ctrl-C and `-m` do."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from src.compare.matched import make_study
from src.engine.engine import Engine
from src.retention.store import load_retention
from src.session import model
from src.session.progress import Progress
from tests.support.cli import ROOT, call, folders, lines, metrics, predictions, start, wait_for_lines

FIELDS = {
    *("task", "id", "prompt_hash", "prompt_tokens", "new_tokens", "prediction", "answers", "all_classes", "length"),
    *("score", "extra_scores", "kept", "kv_bytes", "kv_bytes_peak", "bookkeeping_bytes", "kv_bytes_full", "seconds"),
    "kv_byte_steps",
    *(
        "prefill_seconds",
        "decode_seconds",
        "decode_steps",
        "lanes",
        "truncated",
        "finish",
        "fidelity",
        "error",
        "metric",
        "schema_version",
    ),
}


def test_the_command_writes_its_folder(base: list[str], tmp_path: Path) -> None:
    """As a user types it: exit code, the last line on stdout, and what nothing else may be printed on."""
    command = [sys.executable, "-m", "src.run", *base, "policy=h2o", "budget=40"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (only,) = folders(tmp_path / "results").values()
    assert done.stdout.splitlines() == [f"results: {only}"]
    assert re.fullmatch(r"h2o-40-[0-9a-f]{8}", only.name) and only.parent == tmp_path / "results" / "tiny-llama"
    wanted = "config.yaml environment.json predictions.jsonl metrics.json retention.npz retention.png settings.json"
    assert {path.name for path in only.iterdir()} - {".lock"} == set(wanted.split())
    assert (only / "retention.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_and_metrics(base: list[str]) -> None:
    done = call("run", *base, "policy=h2o", "budget=40", "tasks.names=[needle,few_shot]")
    assert done.code == 0, done.err
    records, found = lines(done.folder), metrics(done.folder)
    assert sorted(r["id"] for r in records) == ["few_shot-0-0", "few_shot-0-1", "needle-0-0", "needle-0-1"]
    entry = 2 * 2 * 2 * 16 * 4  # keys and values x layers x KV heads x head dimension x float32
    for record in records:
        assert set(record) == FIELDS | {"score_slope", "score_slope_theory", "score_by_octave", "check"}
        assert record["error"] is None and record["fidelity"] is None and record["truncated"] is True
        assert 190 <= record["prompt_tokens"] <= 240 and record["kept"] == {"prompt": 40, "end": 40}
        assert record["kv_bytes"] == record["kv_bytes_peak"] == 40 * entry
        assert record["kv_byte_steps"] == 40 * entry * record["decode_steps"]
        assert record["kv_bytes_full"] == record["prompt_tokens"] * entry and record["bookkeeping_bytes"] > 0
        assert 1 <= record["new_tokens"] <= 8 and record["finish"] in ("length", "stop")
        assert record["new_tokens"] == 8 or record["finish"] == "stop"
        assert record["seconds"] == record["prefill_seconds"] + record["decode_seconds"] > 0
        assert record["lanes"] == 4 and len(record["answers"]) == 1 and 0 <= record["score"] <= 100
    assert [found[name] for name in ("policy", "model", "budget", "samples", "failed")] == [
        *("h2o", "tiny-llama", 40, 4, 0),
    ]
    for task, metric in (("needle", "count_score"), ("few_shot", "classification_score")):
        scores = [r["score"] for r in records if r["task"] == task]
        figures = found["tasks"][task]
        assert (figures["n"], figures["failed"], figures["metric"]) == (2, 0, metric)
        assert figures["score"] == pytest.approx(statistics.mean(scores), abs=1e-4)
        assert figures["stderr"] == pytest.approx(statistics.stdev(scores) / 2**0.5, abs=1e-4)
    assert found["average"] == pytest.approx(statistics.mean(t["score"] for t in found["tasks"].values()), abs=1e-4)
    memory = found["memory"]
    full = statistics.mean(r["kv_bytes_full"] for r in records)
    assert (memory["kv_bytes_mean"], memory["kv_bytes_full_mean"]) == (40 * entry, full)
    assert memory["ratio"] == pytest.approx(40 * entry / full, abs=1e-6) and memory["peak_bytes"] > 1 << 20
    steps, seconds = sum(r["new_tokens"] - 1 for r in records), sum(r["decode_seconds"] for r in records)
    assert found["speed"]["decode_tokens_per_second"] == pytest.approx(steps / seconds, rel=1e-3)
    assert found["speed"]["lanes"] == 4 and found["speed"]["prefill_seconds"] > 0
    assert found["comparability"].pop("weights").endswith("tiny-llama")
    assert re.fullmatch("[0-9a-f]{16}", found["comparability"].pop("model_fingerprint"))
    assert found["comparability"] == {
        "max_prompt_tokens": 200,
        "chat_template": True,
        "rouge": "rouge 1.0.1",
        "edit_similarity": "levenshtein",
        "prompt_scope": "whole",
        "max_new_tokens": 8,
        "random_weights": False,
        "dtype": "float32",
        "task_versions": {"needle": 2, "few_shot": 2},
    }
    assert found["retention"]["kept_mean"] == 40
    kept = load_retention(done.folder / "retention.npz")
    assert len(kept.keys) == 4
    config = (done.folder / "config.yaml").read_text()
    assert "name: h2o" in config and "heavy_share: 0.5" in config and "budget: 40" in config
    environment = json.loads((done.folder / "environment.json").read_text())
    assert environment["device"] == "cpu" and environment["versions"]["torch"]


def test_two_runs_are_identical_and_policies_differ(base: list[str], tmp_path: Path) -> None:
    found = []
    for name, policy in (("a", "ahakv"), ("b", "ahakv"), ("c", "streaming_llm")):
        done = call("run", *base, f"policy={policy}", "budget=40", f"output_root={tmp_path / name}")
        assert done.code == 0, done.err
        found.append((done.folder.name, predictions(done.folder)))
    assert found[0] == found[1]
    assert [p[0] for p in found[0][1].values()] != [p[0] for p in found[2][1].values()]  # or this proves nothing


def test_folder_names_what_changes_outcomes(base: list[str]) -> None:
    """The hash changes with every setting of an outcome, and with nothing else."""

    def name(*changes: str) -> str:
        done = call("run", *base, "policy=snapkv", "budget=40", "limit=1", "retention=off", *changes)
        assert done.code == 0, done.err
        return done.folder.name

    first = name()
    different = ["policy.kernel=1", "seed=1", "prompt_scope=context", "max_new_tokens=7", "model.chat=false"]
    others = [name(change) for change in different]
    assert len({first, *others}) == 1 + len(different)
    for same in ("limit=2", "lanes=1", "tasks=few_shot", "fidelity=true", "wandb.project=other"):
        assert name(same) == first


def test_question_unseen_while_the_cache_is_cut(base: list[str]) -> None:
    """prompt_scope=context: full-cache predictions stay, a policy's may not, and both say what they are."""
    found: dict[tuple[str, str], Any] = {}
    for scope in ("whole", "context"):
        for policy in ("full", "snapkv"):
            done = call("run", *base, f"policy={policy}", "budget=40", f"prompt_scope={scope}", "max_new_tokens=12")
            assert done.code == 0, done.err
            assert metrics(done.folder)["comparability"]["prompt_scope"] == scope
            found[policy, scope] = lines(done.folder)
    answers = {key: [r["prediction"] for r in records] for key, records in found.items()}
    assert answers["full", "whole"] == answers["full", "context"]
    assert answers["snapkv", "whole"] != answers["snapkv", "context"]
    question = found["snapkv", "context"][0]["kept"]["end"] - found["snapkv", "whole"][0]["kept"]["end"]
    assert question > 50  # the question's characters came after the cut, and SnapKV never evicts later


def test_fidelity_is_added_to_a_finished_folder(base: list[str]) -> None:
    for policy in ("full", "h2o"):
        before = call("run", *base, f"policy={policy}", "budget=40")
        plain = predictions(before.folder)
        assert metrics(before.folder)["fidelity"] is None
        after = call("run", *base, f"policy={policy}", "budget=40", "fidelity=true")
        assert after.code == 0 and after.folder == before.folder
        records = lines(after.folder)[len(plain) :]
        assert [(r["task"], r["id"]) for r in records] == list(plain)
        assert [r["prediction"] for r in records] == [p[0] for p in plain.values()]
        for record in records:
            measured = record["fidelity"]
            assert measured["nll"] > 0 and 0 <= measured["top1"] <= 1 and len(measured["output_error"]) == 2
            assert measured["kl"] == 0 if policy == "full" else measured["kl"] > 0
        summary = metrics(after.folder)
        assert summary["samples"] == 2 and summary["fidelity"]["n"] == 2
        with_it = (after.folder / "predictions.jsonl").read_bytes()
        assert call("run", *base, f"policy={policy}", "budget=40").code == 0  # and a run without keeps it
        assert (after.folder / "predictions.jsonl").read_bytes() == with_it
        assert metrics(after.folder)["fidelity"]["n"] == 2


def test_short_prompts_are_kept_whole(base: list[str]) -> None:
    for policy in ("snapkv", "ahakv", "h2o", "streaming_llm"):
        done = call("run", *base, f"policy={policy}", "budget=2000", "retention=off")
        assert done.code == 0, done.err
        for record in lines(done.folder):
            assert record["kept"]["prompt"] == record["prompt_tokens"]


def test_overwrite_starts_afresh(base: list[str]) -> None:
    first = call("run", *base, "policy=h2o", "budget=40")
    again = call("run", *base, "policy=h2o", "budget=40", "limit=1", "overwrite=true")
    assert again.folder == first.folder and len(lines(again.folder)) == 1


def test_memory_running_out_fails_that_sample_only(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Engine.prefill

    def prefill(self: Engine, job: Any) -> Any:
        if "needle-0-1" in job.request.name:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return plain(self, job)

    monkeypatch.setattr(Engine, "prefill", prefill)
    done = call("run", *base, "policy=h2o", "budget=40", "limit=3")
    assert done.code == 1 and "1 samples failed" in done.err
    errors = {r["id"]: r["error"] for r in lines(done.folder)}
    assert "out of memory" in errors.pop("needle-0-1") and set(errors.values()) == {None}
    figures = metrics(done.folder)["tasks"]["needle"]
    assert (figures["n"], figures["failed"]) == (2, 1)
    monkeypatch.undo()
    again = call("run", *base, "policy=h2o", "budget=40", "limit=3")
    assert again.code == 0 and len(lines(again.folder)) == 4
    assert metrics(again.folder)["tasks"]["needle"]["failed"] == 0


# Ctrl-C.


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, times: int) -> None:
    """Press Ctrl-C so many times right after the first call of a method."""
    plain, pressed = getattr(owner, method), []

    def wrapped(self: Any, *arguments: Any) -> Any:
        answer = plain(self, *arguments)
        if not pressed:
            pressed.append(1)
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return answer

    monkeypatch.setattr(owner, method, wrapped)


def test_ctrl_c_finishes_the_samples_in_flight(
    base: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = [*base, "policy=h2o", "budget=40", "limit=5", "lanes=2"]
    undisturbed = predictions(call("run", *arguments, f"output_root={tmp_path / 'other'}").folder)
    with monkeypatch.context() as patch:
        interrupt(patch, Progress, "done", times=1)
        done = call("run", *arguments)
    assert done.code == 130
    assert len(lines(done.folder)) == 2  # the one in flight beside it, not the third that was fetched already
    assert metrics(done.folder)["samples"] == 2 and (done.folder / "retention.npz").exists()
    assert "2 of 5 done; the same command goes on" in done.err and "Traceback" not in done.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert metrics(done.folder)["missing"] == [["needle", f"needle-0-{i}"] for i in (2, 3, 4)]
    assert "was interrupted with 3 samples missing" in make_study([done.folder]).warnings[0]
    assert call("run", *arguments, "limit=3").code == 0
    assert len(metrics(done.folder)["missing"]) == 2  # a smaller call does not forget them
    assert call("run", *arguments).code == 0
    assert predictions(done.folder) == undisturbed
    assert metrics(done.folder)["missing"] == [] and not make_study([done.folder]).warnings


def test_ctrl_c_begins_no_further_prompt(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts take long: of a wave of five, only the one being read is finished."""
    interrupt(monkeypatch, Engine, "prefill", times=1)
    done = call("run", *base, "policy=h2o", "budget=40", "limit=5", "overwrite=true")
    assert done.code == 130 and len(lines(done.folder)) == 1
    assert "without overwrite=true" in done.err


def test_second_ctrl_c_stops_at_once(base: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, Progress, "done", times=2)
        done = call("run", *base, "policy=h2o", "budget=40", "lanes=2")
    (folder,) = folders(tmp_path / "results").values()
    assert done.code == 130 and len(lines(folder)) == 1 and not (folder / "metrics.json").exists()
    assert "1 of 2 done" in done.err
    again = call("run", *base, "policy=h2o", "budget=40", "lanes=2")
    assert again.code == 0 and len(predictions(again.folder)) == 2


def test_ctrl_c_of_a_process(base: list[str], tmp_path: Path) -> None:
    arguments = [*base, "policy=h2o", "budget=40", "limit=40", "lanes=1", "max_new_tokens=100"]
    process = start("run", *arguments, log=tmp_path / "log")
    wait_for_lines(tmp_path / "results", 1, process)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(60)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 130 and "Traceback" not in log, log
    (folder,) = folders(tmp_path / "results").values()
    assert 1 <= len(lines(folder)) < 40 and metrics(folder)["samples"] == len(lines(folder))
    assert log.splitlines()[-1] == f"results: {folder}"


# Many jobs in one process.


def test_multirun_loads_the_model_once(base: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    plain = model.load_model

    def counted(cfg: Any) -> Any:
        calls.append(cfg)
        return plain(cfg)

    monkeypatch.setattr(model, "load_model", counted)
    model.loaded.cache_clear()
    done = call("run", "-m", *base, "policy=snapkv,h2o", "budget=20,40")
    assert len(calls) == 1
    assert sorted(name.rpartition("-")[0] for name in folders(tmp_path / "results")) == [
        "h2o-20",
        "h2o-40",
        "snapkv-40",
    ]
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(errors) == 1  # the worst of all jobs; the others have finished
    assert "budget=20" in errors[0] and "policy=snapkv" in errors[0] and "33" in errors[0]
    assert len([line for line in done.out.splitlines() if line.startswith("results: ")]) == 3


def test_multirun_ends_with_ctrl_c(base: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupt(monkeypatch, Progress, "done", times=1)
    done = call("run", "-m", *base, "policy=h2o", "budget=40,50")
    assert done.code == 130 and len(folders(tmp_path / "results")) == 1
