"""W&B for real, without its server: offline files read back, and every way a server can fail."""

import http.server
import inspect
import json
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import wandb
import yaml

from src.errors import InputError
from src.records.record import Record
from src.report.wandb import track_report
from src.report.write import write_report
from src.tracking import wandb as tracking
from src.tracking.server import key_configured, server, within
from src.tracking.wandb import NoTracker, Tracking, WandbTracker, _run_id, summary
from tests.support import wandb_file
from tests.support.synthetic_runs import record, write_run

KEY = "0" * 40
RECORD = Record(task="qa", id="1", prompt_hash="aa", score=25.0, seconds=1.5, prediction="yes", answers=["yes", "yeah"])
METRICS: dict[str, Any] = {
    "average": 25.0, "samples": 1, "failed": 0, "tasks": {"qa": {"score": 25.0, "stderr": None, "n": 1}},
    "memory": {"ratio": 0.25, "kv_bytes_mean": 100.0}, "speed": {"decode_tokens_per_second": 9.0, "lanes": 1},
    "fidelity": {"kl": 0.125}, "retention": {
        "histogram": [1.0] + [0.0] * 63, "kept_mean": 8.0, "gini": 0.9, "heavy": {"kl_uniform": 0.5},
        "decile_shares": [0.75, 0.25], "per_layer": {"gini": [0.25, 0.5]}, "per_head": {"gini": [[1.0], [1.0]]}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no settings, no server, whoever runs the tests; and a working folder that must stay clean."""
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "NETRC",
        "WANDB_DIR",
        "WANDB_CONFIG_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("home", "cwd", "run"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path / "cwd")
    wandb.teardown()  # what an earlier test's environment said


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def failing_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that is there but answers every request with status 500."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(500)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def written(run: Path) -> dict[str, dict[str, str]]:
    files = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    until = time.monotonic() + 20
    while not wandb_file.finished(files[0]) and time.monotonic() < until:
        time.sleep(0.02)  # wandb's service writes the last block a moment after `finish` has returned
    return wandb_file.values(files[0])


def test_a_report_is_a_run_of_its_own(run: Path, tmp_path: Path) -> None:
    for policy, gain in (("h2o", 0), ("snapkv", 1)):
        write_run(tmp_path / "runs", policy, 64, [record("qasper", i, 10.0 * i + gain, 64) for i in range(6)])
    _, analysis, tables = write_report([tmp_path / "runs"], out=run, resamples=1000)
    assert track_report("offline", "studies", run, analysis, tables)
    found = written(run)["summary"]
    for table in tables:
        assert found[f"tables/{table.name}/_type"] == '"table-file"'
    assert found["figures/score_vs_budget/_type"] == '"image-file"'
    assert found["report/_type"] == '"html-file"'
    assert track_report("disabled", "studies", run, analysis, tables) is False


def test_offline_run_holds_config_scores_memory_speed_predictions_and_retention(run: Path) -> None:
    matplotlib.image.imsave(run / "retention.png", np.zeros((4, 4)))
    tracker = Tracking("auto").start(run, {"budget": 4, "policy": {"name": "h2o"}}, "h2o-4", done=7)
    assert isinstance(tracker, WandbTracker)
    tracker.log_sample(RECORD)
    tracker.finish(METRICS, [RECORD, replace(RECORD, id="2", error="boom", score=None)])
    found = written(run)
    assert json.loads(found["config"]["budget"]) == 4
    assert json.loads(found["config"]["policy"]) == {"name": "h2o"}
    assert found["history"]["samples"] == "8"  # of a resumed run: seven were there
    assert float(found["history"]["sample/qa/score"]) == 25
    last = {name: float(value) for name, value in found["summary"].items() if name in summary(METRICS)}
    assert last["average"] == 25
    assert last["score/qa"] == 25
    assert last["memory/ratio"] == 0.25
    assert last["speed/decode_tokens_per_second"] == 9
    assert last["fidelity/kl"] == 0.125
    assert last["retention/gini"] == 0.9
    assert last["retention/heavy/kl_uniform"] == 0.5
    assert last["retention/decile_shares/00"] == 0.75 and last["retention/per_layer/gini/01"] == 0.5
    assert not any("per_head" in name or "histogram" in name for name in summary(METRICS))
    assert json.loads(found["summary"]["retention/positions/values"]) == [8.0] + [0.0] * 63
    assert json.loads(found["summary"]["retention/positions/bins"])[-1] == 1.0
    assert found["summary"]["retention/layers/_type"] == '"image-file"'
    table = json.loads(next(run.rglob("*.table.json")).read_text())
    assert table["columns"] == list(tracking.TABLE)
    assert [row[:6] for row in table["data"]] == [
        ["qa", "1", 25, "yes", "yes", "yes | yeah"],
        ["qa", "2", None, "yes", "yes", "yes | yeah"],
    ]
    assert list(Path.cwd().iterdir()) == []  # nothing outside the run's folder


def test_a_resumed_folder_goes_on_in_the_same_run(run: Path) -> None:
    for _ in range(2):
        Tracking("offline").start(run, {}, "n").finish(METRICS, [])
        time.sleep(1)  # wandb names its folders by the second
    files = [path.name for path in run.glob("wandb/offline-run-*/*.wandb")]
    assert len(files) == 2
    assert len(set(files)) == 1


@pytest.mark.parametrize("content", [b"", b"  \n", b"a/b", b"\xff\x00", b"x" * 200, b"two\nlines"])
def test_a_damaged_id_is_replaced_with_one_warning(run: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    run.mkdir(exist_ok=True)
    (run / "wandb_id").write_bytes(content)
    first = tracking._run_id(run)
    assert tracking.VALID_ID.fullmatch(first) and (run / "wandb_id").read_text() == f"{first}\n"
    assert tracking._run_id(run) == first
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "wandb_id" in caplog.text
    assert [path.name for path in run.iterdir()] == ["wandb_id"]


def in_wandb_files(run: Path) -> dict[str, bool]:
    """What W&B's own record says of the machine and the command."""
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    written(run)
    content = file.read_bytes()
    secrets = {"host": socket.gethostname(), "program": Path(sys.argv[0]).name, "python": sys.executable}
    found = {name: value.encode() in content for name, value in secrets.items()}
    environments = [r.environment for r in wandb_file.records(file) if r.WhichOneof("record_type") == "environment"]
    hosts = {r.run.host for r in wandb_file.records(file) if r.WhichOneof("record_type") == "run"}
    found["host"] |= socket.gethostname() in hosts
    return found | {"arguments": any(list(e.args) for e in environments), "described": bool(environments)}


@pytest.mark.parametrize("identify", [False, True])
def test_who_and_where_is_recorded_only_if_asked_for(
    run: Path, identify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "a-machine-of-mine")
    monkeypatch.setattr(sys, "argv", ["/a/program-of-mine.py", "--word=given-on-the-command-line"])
    tracker = Tracking("offline", identify=identify).start(run, {"budget": 8}, "name")
    tracker.log_sample(RECORD)
    tracker.finish(METRICS, [RECORD])
    found = in_wandb_files(run)
    if identify:
        assert found["host"] and found["arguments"] and found["described"]
    else:
        assert not any(found.values())
    kept = [path for path in run.rglob("files/*") if path.is_file()]
    assert identify or not any(b"given-on-the-command-line" in path.read_bytes() for path in kept)


def test_two_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    made = Tracking("offline")
    folders = [tmp_path / "run" / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    trackers = [made.start(folder, {"budget": i}, "n") for i, folder in enumerate(folders)]
    for i, tracker in enumerate(trackers):
        tracker.log_sample(replace(RECORD, score=float(i)))
    for tracker in trackers:
        tracker.finish({**METRICS, "retention": {}}, [])
    assert [written(folder)["config"]["budget"] for folder in folders] == ["0", "1"]
    assert [float(written(folder)["history"]["sample/score"]) for folder in folders] == [0, 1]


def test_a_closed_port_means_offline_quickly_and_one_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.socket() as free:  # bound but not listening: connecting is refused
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        start = time.monotonic()
        made = Tracking("online")
        made.start(run, {"budget": 4}, "n").finish(METRICS, [RECORD])
        (run / "second").mkdir()
        made.start(run / "second", {}, "n").finish(METRICS, [RECORD])
        assert time.monotonic() - start < 15
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING and r.name == "src.tracking.wandb"]) == 1
    assert "wandb sync" in caplog.text
    assert written(run)["config"]["budget"] == "4"


def test_a_server_that_never_answers_does_not_hold_up_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        Tracking("auto", init_timeout=2).start(run, {}, "n").finish(METRICS, [])
        assert time.monotonic() - start < 12
    assert written(run)["summary"]["average"] == "25.0"


def test_a_server_that_fails_means_offline_in_the_same_process(
    run: Path, failing_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", failing_server)
    start = time.monotonic()
    Tracking("online", init_timeout=3).start(run, {"budget": 4}, "n").finish(METRICS, [RECORD])
    assert time.monotonic() - start < 20
    assert "opened no run" in caplog.text
    assert written(run)["config"]["budget"] == "4"


def test_online_without_a_key_warns_instead_of_asking(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    Tracking("online").start(run, {}, "n").finish(METRICS, [])
    assert "no API key" in caplog.text
    assert written(run)


def test_auto_without_a_key_neither_contacts_a_server_nor_warns(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "server_answers", lambda *_: pytest.fail("contacted the server"))
    made = Tracking("auto")
    made.start(run, {}, "n").finish(METRICS, [])
    assert made.mode == "offline"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(("wish", "mode"), [("disabled", "disabled"), ("dryrun", "offline"), ("offline", "offline")])
def test_auto_honours_wandb_mode(run: Path, monkeypatch: pytest.MonkeyPatch, wish: str, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", wish)
    monkeypatch.setattr(WandbTracker, "__init__", lambda *_: None)
    monkeypatch.setattr(Tracking, "_init", lambda *_: (object(), ""))
    made = Tracking("auto")
    tracker = made.start(run, {}, "n")
    assert made.mode == mode
    assert isinstance(tracker, NoTracker) == (mode == "disabled")


def test_disabled_writes_nothing(run: Path) -> None:
    tracker = Tracking("disabled").start(run, {}, "n")
    tracker.log_sample(RECORD)
    tracker.finish(METRICS, [RECORD])
    assert list(run.iterdir()) == []


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"wandb\.mode=on: valid are auto, online, offline, disabled"):
        Tracking("on")


def test_the_configuration_names_exactly_the_settings() -> None:
    text = (Path(__file__).resolve().parents[2] / "conf" / "common.yaml").read_text()
    settings = yaml.safe_load(text)["wandb"]
    assert set(settings) == set(inspect.signature(Tracking).parameters)
    assert Tracking(**settings).mode == "auto"


def test_failures_of_wandb_are_one_warning_and_no_exception(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def define_metric(self, *_: Any, **__: Any) -> None:
            pass

        def log(self, values: Any) -> None:
            raise OSError("disk\nfull")

        def finish(self, code: int) -> None:
            pass

    tracker = WandbTracker(Broken(), run, Tracking("offline"), 0)
    tracker.log_sample(RECORD)
    tracker.log_sample(RECORD)
    tracker.finish(METRICS, [RECORD])
    assert [r.getMessage() for r in caplog.records] == ["W&B stopped tracking this run: OSError: disk full"]


def test_a_finish_that_hangs_is_left_behind(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Hanging:
        def define_metric(self, *_: Any, **__: Any) -> None:
            pass

        def finish(self, code: int) -> None:
            time.sleep(30)

    tracker = WandbTracker(Hanging(), run, Tracking("offline", finish_timeout=-9.5), 0)
    start = time.monotonic()
    tracker._log_end = lambda *_: None  # type: ignore[method-assign]
    tracker.finish(METRICS, [])
    assert time.monotonic() - start < 5
    assert "wandb sync" in caplog.text


def test_within_gives_results_errors_and_up() -> None:
    assert within(5, lambda: 3) == (True, 3)
    done, error = within(5, lambda: 1 // 0)
    assert done
    assert isinstance(error, ZeroDivisionError)
    assert within(0.05, lambda: time.sleep(5)) == (False, None)


def test_a_key_is_found_where_wandb_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not key_configured()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert key_configured()
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert not key_configured()

    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    netrc.chmod(0o600)
    assert not key_configured()  # a key for another server than WANDB_BASE_URL
    monkeypatch.delenv("WANDB_BASE_URL")
    assert key_configured()
    netrc.write_text("not a netrc")
    assert not key_configured()
    netrc.unlink()

    settings = tmp_path / "home" / ".config" / "wandb"
    settings.mkdir(parents=True)
    (settings / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert not key_configured()
    assert server() == "https://wandb.example.org"
    (settings / "settings").write_text(f"[default]\napi_key = {KEY}\n")
    assert key_configured()


def test_long_tables_are_thinned_evenly(run: Path) -> None:
    tracker = Tracking("offline", table_rows=10).start(run, {}, "n")
    tracker.finish({**METRICS, "retention": {}}, [replace(RECORD, id=str(i)) for i in range(95)])
    table = json.loads(next(run.rglob("*.table.json")).read_text())
    assert [row[1] for row in table["data"]] == [str(i) for i in range(0, 95, 10)]


def test_what_the_summary_says_of_scores_needles_and_choices() -> None:
    kept = {
        "needle": {"samples": 2, "after_prompt": 0.5, "per_layer": [0.25, 0.75]},
        "score_slope": {"mean": -0.2, "theory": None, "per_head": [[1.0]], "per_task": {"qa": -0.2}},
        "chosen": {"share": 0.1, "histogram": [0.5, 0.5], "per_task": {"qa": {"histogram": [1, 0], "gini": 0.5}}},
    }
    tasks = {"qa": {"score": 1.0, "extra_scores": {"by_number": 40.0}}}
    found = tracking.summary({"retention": kept, "tasks": tasks, "fidelity": {"output_error": [0.1, 0.3]}})
    assert found == {
        "score/qa": 1.0,
        "extra_score/qa/by_number": 40.0,
        "fidelity/output_error/00": 0.1,
        "fidelity/output_error/01": 0.3,
        "retention/needle/samples": 2,
        "retention/needle/after_prompt": 0.5,
        "retention/needle/per_layer/00": 0.25,
        "retention/needle/per_layer/01": 0.75,
        "retention/score_slope/mean": -0.2,
        "retention/score_slope/per_task/qa": -0.2,
        "retention/chosen/share": 0.1,
        "retention/chosen/per_task/qa/gini": 0.5,
    }


@pytest.mark.parametrize("content", ["", "\n", "\0" * 13, "two words\n"])
def test_a_damaged_run_id_is_replaced(tmp_path: Path, content: str) -> None:
    """W&B would refuse it at every launch."""
    (tmp_path / "wandb_id").write_text(content)
    known = _run_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", known) and _run_id(tmp_path) == known
