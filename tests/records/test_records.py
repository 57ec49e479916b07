"""The run folder: resume, repair, collisions, locks, and the figures of metrics.json."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.errors import InputError
from src.records.environment import environment
from src.records.files import load_records, run_path, settings_hash
from src.records.folder import RunFolder
from src.records.metrics import compute_metrics
from src.records.record import Record
from src.retention.store import Kept, load_retention

SETTINGS = {"policy": {"name": "snapkv", "window": 32}, "budget": 4, "seed": 0}
NAMES: dict[str, Any] = {"policy": "snapkv", "model": "tiny", "budget": 4}


def record(task: str = "qa", id_: str = "1", **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "task": task, "id": id_, "prompt_hash": "aa", "prompt_tokens": 10, "new_tokens": 5,
        "prediction": "yes", "answers": ["yes"], "score": 50.0, "kv_bytes": 100, "kv_bytes_full": 400,
        "prefill_seconds": 1.0, "decode_seconds": 2.0, "lanes": 1, "error": None, "fidelity": None,
    }  # fmt: skip
    return Record.of(fields | changes)


def kept(*positions: int) -> Kept:
    """The same positions in both heads of one layer."""
    return Kept([np.array([positions, positions])], [np.array([positions, positions])])


def folder(path: Path, **options: Any) -> RunFolder:
    return RunFolder(path, SETTINGS, "budget: 4\n", **options)


# --- names and hashes ---


def test_hash_is_eight_hex_digits_that_ignore_order_and_number_type() -> None:
    assert settings_hash({"a": 1, "b": {"c": (1, 2)}}) == settings_hash({"b": {"c": [1.0, 2]}, "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})
    assert settings_hash({"a": 0.5}) != settings_hash({"a": "0.5"})
    assert len(settings_hash({})) == 8
    int(settings_hash({}), 16)


def test_hash_is_stable_over_releases() -> None:
    assert settings_hash({"policy": "h2o", "budget": 512}) == "e63bd80b"


def test_path_is_model_then_policy_budget_hash(tmp_path: Path) -> None:
    path = run_path(tmp_path, "org/model", "h2o", 512, SETTINGS)
    assert path == tmp_path / "org_model" / f"h2o-512-{settings_hash(SETTINGS)}"
    assert run_path(tmp_path, "m", "h2o", 0.25, SETTINGS).name.startswith("h2o-0.25-")
    assert tmp_path in run_path(tmp_path, "../../etc", "h2o", 1, {}).resolve().parents


# --- resume ---


def test_a_record_is_done_after_reopening_and_only_for_its_own_prompt(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        assert not run.done(("qa", "1", "aa"))
        run.append(record())
    with folder(tmp_path) as run:
        assert run.done(("qa", "1", "aa"))
        assert not run.done(("qa", "1", "bb"))  # changed data
        assert not run.done(("qa", "1", "aa"), fidelity=True)
        run.append(record(fidelity={"nll": 1.0, "kl": 0.5, "top1": 0.9}))
        assert run.done(("qa", "1", "aa"), fidelity=True)
    assert len(load_records(tmp_path)) == 1


def test_a_failed_sample_is_tried_again_and_then_replaced(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.append(record(error="out of memory", score=None))
        assert not run.done(("qa", "1", "aa"))
        assert run.finish(**NAMES)["tasks"]["qa"] == {
            "score": None, "n": 0, "stderr": None, "metric": None, "failed": 1,
        }  # fmt: skip
        run.append(record())
        assert run.done(("qa", "1", "aa"))
        metrics = run.finish(**NAMES)
    assert metrics["tasks"]["qa"]["n"] == 1
    assert metrics["failed"] == 0


def test_a_failed_second_try_does_not_cost_a_good_prediction(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.append(record(score=70.0))
        run.append(record(score=None, error="out of memory"))
        assert run.done(("qa", "1", "aa"))
    assert [r.score for r in load_records(tmp_path)] == [70.0]


def test_changed_data_replaces_the_old_record_and_may_change_back(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.append(record(score=10.0), kept(0, 1))
        run.append(record(prompt_hash="bb", score=20.0), kept(8, 9))
        assert [r.score for r in run.records] == [20.0]
        assert run.finish(**NAMES)["average"] == 20.0
    with folder(tmp_path) as run:
        assert run.done(("qa", "1", "aa"))
        assert run.finish(**NAMES)["average"] == 10.0
    assert [r.score for r in load_records(tmp_path)] == [10.0]


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_cut_off_with_a_warning(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    with folder(tmp_path) as run:
        run.append(record(id_="1"))
        run.append(record(id_="2"))
    path = tmp_path / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with caplog.at_level(logging.WARNING), folder(tmp_path) as run:
        # Without just its line end the record is complete, so it counts; otherwise it must run again.
        assert run.done(("qa", "2", "aa")) == (cut == 1)
        run.append(record(id_="2"))
    assert "predictions.jsonl" in caplog.text
    lines = path.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == (["1", "2", "2"] if cut == 1 else ["1", "2"])


def test_a_broken_line_in_the_middle_is_dropped_by_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with folder(tmp_path) as run:
        run.append(record(id_="1"))
        run.append(record(id_="2"))
    path = tmp_path / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"{broken\n" + whole)
    assert len(load_records(tmp_path)) == 2 and "predictions.jsonl:1: damaged" in caplog.text
    caplog.clear()
    folder(tmp_path).close()
    assert "predictions.jsonl:1: damaged" in caplog.text and path.read_bytes() == whole
    path.write_text("{}\n{}\n")
    assert load_records(tmp_path) == [] and "predictions.jsonl:1, 2: damaged (task should be" in caplog.text


def test_any_text_survives_unchanged(tmp_path: Path) -> None:
    odd = ["a\u2028b\r\nc\x85d", "汉字", "\ud83d half a pair", "\x00"]
    with folder(tmp_path) as run:
        for i, text in enumerate(odd):
            run.append(record(id_=str(i), prediction=text))
    assert [r.prediction for r in load_records(tmp_path)] == odd


def test_kill_nine_at_any_moment_then_resume_gives_the_same_tables(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.support.records_worker"]
    subprocess.run([*command, str(undisturbed)], check=True, cwd=root)
    random = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen([*command, str(disturbed)], cwd=root)
        lines, target = disturbed / "predictions.jsonl", int(random.integers(1, 8))
        before = lines.stat().st_size if lines.exists() else 0
        while process.poll() is None and (lines.stat().st_size if lines.exists() else 0) < before + 200 * target:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # else it had finished, and nothing was tested
    with (disturbed / "predictions.jsonl").open("ab") as file:
        file.write(b'{"task": "qa", "id"')
    with (disturbed / "retention.part").open("ab") as file:
        file.write(b"KVR1 torn")
    subprocess.run([*command, str(disturbed)], check=True, cwd=root)
    assert (disturbed / "metrics.json").read_bytes() == (undisturbed / "metrics.json").read_bytes()
    assert load_records(disturbed) == load_records(undisturbed)
    assert len((disturbed / "predictions.jsonl").read_text().splitlines()) == 40  # none twice, none lost
    assert (disturbed / "retention.npz").read_bytes() == (undisturbed / "retention.npz").read_bytes()
    assert not (disturbed / "retention.part").exists()


# --- collisions, locks, overwriting ---


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path: Path) -> None:
    folder(tmp_path).close()
    with pytest.raises(InputError, match=r"policy\.window: 32 there, 16 here") as caught:
        RunFolder(tmp_path, {**SETTINGS, "policy": {"name": "snapkv", "window": 16}})
    assert "\n" not in str(caught.value)
    folder(tmp_path).close()  # refusing left the lock free


def test_predictions_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text(json.dumps(record().as_dict()) + "\n")
    with pytest.raises(InputError, match="unknown"):
        folder(tmp_path)


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with folder(tmp_path), pytest.raises(InputError, match=f"{tmp_path}.*another process"):
        folder(tmp_path)
    folder(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        folder(tmp_path / "file" / "run")


def test_overwrite_starts_afresh_and_leaves_other_files_alone(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.append(record(), kept(0, 1))
        run.finish(**NAMES)
    (tmp_path / "notes.txt").write_text("mine")
    with folder(tmp_path, overwrite=True) as run:
        assert not run.done(("qa", "1", "aa"))
        assert run.records == []
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "retention.npz").exists()
    assert (tmp_path / "notes.txt").exists()


def test_a_wrong_retention_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="positions, bins, off"):
        folder(tmp_path, retention="all")


# --- what finish writes ---


def test_config_and_environment_are_written_and_earlier_environments_kept(tmp_path: Path) -> None:
    folder(tmp_path, environment={"torch": "1"}).close()
    folder(tmp_path, environment={"torch": "1"}).close()
    folder(tmp_path, environment={"torch": "2"}).close()
    assert (tmp_path / "config.yaml").read_text() == "budget: 4\n"
    written = json.loads((tmp_path / "environment.json").read_text())
    assert len(written.pop("check")) == 8 and written == {"torch": "2", "earlier": [{"torch": "1"}]}


def test_environment_names_versions_processor_and_commit() -> None:
    found = environment("cpu")
    assert found["versions"]["torch"].startswith("2.")
    assert found["device"] == "cpu"
    assert found["cpu"]
    assert found["torch_threads"] >= 1
    assert found["git"] is None or len(found["git"]["commit"]) == 40
    json.dumps(found)


@pytest.mark.pictures
def test_retention_follows_the_records_over_a_resumed_run(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.append(record(id_="1"), kept(0, 1, 11))
        run.finish(**NAMES)
    with folder(tmp_path) as run:
        run.append(record(id_="2"), kept(8, 9))
        run.append(record(id_="3", score=None, error="boom"))
        run.append(record(id_="4"))  # no retention known
        metrics = run.finish(**NAMES)
    stored = load_retention(tmp_path)
    assert [key[1] for key in stored.keys] == ["1", "2"]
    assert np.flatnonzero(stored.sample(stored.keys[0]).kept()[0, 0]).tolist() == [0, 1]
    assert stored.sample(stored.keys[0]).generated.tolist() == [[1, 1]]
    assert metrics["retention"]["samples"] == 2
    assert metrics["retention"]["mean_position"] == pytest.approx((0.1 + 0.9) / 2)
    assert (tmp_path / "retention.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_retention_off_writes_none(tmp_path: Path) -> None:
    with folder(tmp_path, retention="off") as run:
        run.append(record(), kept(0, 1))
        assert run.finish(**NAMES)["retention"] == {}
    assert not list(tmp_path.glob("retention*"))


def test_peaks_survive_a_resume_that_has_nothing_to_do(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.append(record())
        run.finish(**NAMES, peaks={"peak_bytes": 900})
    with folder(tmp_path) as run:
        assert run.finish(**NAMES, peaks={"peak_bytes": 100})["memory"]["peak_bytes"] == 900


def test_metrics_by_hand() -> None:
    rows = [
        record("a", "1", score=0.0, new_tokens=5, decode_seconds=2.0, kv_bytes=100, extra_scores={"rouge1": 10.0}),
        record(
            "a",
            "2",
            score=30.0,
            new_tokens=3,
            decode_seconds=1.0,
            kv_bytes=200,
            extra_scores={"rouge1": 20.0},
        ),
        record("a", "3", score=60.0, new_tokens=1, decode_seconds=0.0, kv_bytes=300, truncated=True),
        record("b", "1", score=10.0, kv_bytes=200, fidelity={"nll": 2.0, "kl": 0.5, "top1": 1.0}),
        record("b", "2", score=None, error="no", kv_bytes=None),
    ]
    metrics = compute_metrics(
        rows[::-1],
        **NAMES,
        task_metrics={"a": "qa_f1"},
        peaks={"peak_bytes": 7},
        comparability={"dtype": "float32"},
    )
    # sd of 0, 30, 60 is 30; 30 / sqrt(3) = 17.3205
    assert metrics["tasks"]["a"] == {
        "score": 30.0, "n": 3, "stderr": 17.3205, "metric": "qa_f1", "failed": 0,
        "extra_scores": {"rouge1": 15.0},
    }  # fmt: skip
    assert metrics["tasks"]["b"]["stderr"] is None
    assert (metrics["tasks"]["b"]["n"], metrics["tasks"]["b"]["failed"]) == (1, 1)
    assert metrics["average"] == 20.0  # of 30 and 10, not of the four samples
    assert (metrics["samples"], metrics["failed"], metrics["truncated_prompts"]) == (4, 1, 1)
    assert metrics["fidelity"] == {"kl": 0.5, "nll": 2.0, "top1": 1.0, "n": 1}
    assert metrics["memory"]["kv_bytes_mean"] == 200.0
    assert metrics["memory"]["ratio"] == 0.5
    assert metrics["memory"]["peak_bytes"] == 7
    # steps: 4 + 2 + (sample without decode time left out) + 4, seconds 2 + 1 + 2
    assert metrics["speed"] == {"prefill_seconds": 1.0, "decode_tokens_per_second": 2.0, "lanes": 1}
    assert metrics["comparability"] == {"dtype": "float32"}


def test_metrics_of_nothing_have_no_numbers() -> None:
    metrics = compute_metrics([], **NAMES)
    assert metrics["average"] is None
    assert metrics["tasks"] == {}
    assert metrics["memory"]["ratio"] is None


def test_metrics_do_not_depend_on_the_order_of_the_records() -> None:
    random = np.random.default_rng(1)
    rows = [record("a", str(i), score=float(random.random() * 100 / 3)) for i in range(200)]
    expected = compute_metrics(rows, **NAMES)
    for _ in range(5):
        random.shuffle(rows)  # type: ignore[arg-type]
        assert compute_metrics(rows, **NAMES) == expected
    assert not math.isnan(expected["average"])


def test_no_metrics_file_is_ever_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder(tmp_path) as run:
        run.append(record())
        run.finish(**NAMES)
        before = (tmp_path / "metrics.json").read_bytes()

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(InputError, match=r"metrics\.json: cannot be written \(No space"):
            run.finish(**NAMES, task_metrics={"qa": "qa_f1"})
        assert (tmp_path / "metrics.json").read_bytes() == before
