"""Loading from the hub, with a small server on the loopback interface in the hub's place.

huggingface_hub reads its settings when it is imported, so each case runs in a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import tiny, tiny_tokenizer, tokens

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parents[2]
# What a real repository also holds, and what must not be fetched: pickles and second copies of the weights.
UNWANTED = [
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
]

CHILD = """
import json, sys, torch
from src.errors import InputError
from src.models.load import load_model
from src.models.settings import model_settings
for settings in json.loads(sys.argv[1]):
    try:
        loaded = load_model(model_settings("llama3-8b", **{"stop_tokens": [], "device": "cpu", **settings}))
        ids = torch.tensor([json.loads(sys.argv[2])])
        print(json.dumps({"source": loaded.source, "logit": loaded.model(ids).logits[0, -1, 7].item()}))
    except InputError as error:
        print(json.dumps({"error": str(error)}))
"""


class Hub(ThreadingHTTPServer):
    """Serves one model, refuses one as gated, drops the connection for one, and knows no other."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        files = {str(p.relative_to(self.server.folder)): p for p in self.server.folder.rglob("*") if p.is_file()}
        if "/drops/" in path:
            self.close_connection = True
        elif "/gated/" in path:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "/team/tiny" not in path:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path in ("/api/models/team/tiny/revision/main", f"/api/models/team/tiny/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in files]
            self.reply_json({"id": "team/tiny", "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/team/tiny/tree/{COMMIT}":
            self.reply_json(
                [{"type": "file", "path": n, "size": p.stat().st_size, "oid": oid(p)} for n, p in files.items()]
            )
        elif path.startswith("/team/tiny/resolve/") and (name := path.split("/", 5)[5]) in files:
            if self.command == "GET":
                self.server.fetched.append(name)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(files[name])}"'}
            self.reply(200, files[name].read_bytes(), headers)
        else:
            code = "RevisionNotFound" if "/revision/" in path else "EntryNotFound"
            self.reply(404, b"{}", {"X-Error-Code": code})

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    tiny("llama").save_pretrained(folder, max_shard_size="60KB")  # in several files, as the large models are
    tiny_tokenizer().save_pretrained(folder)
    for name in UNWANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"must not be fetched")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run(home: Path, cases: list[dict[str, Any]], **env: str) -> list[dict[str, Any]]:
    """Load each case in one fresh process whose hub cache is `home`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(cases), json.dumps(tokens(20)[0].tolist())],
        cwd=ROOT,
        env={**clean, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(cases)
    assert all("\n" not in answer.get("error", "") for answer in answers)
    return answers


def test_hub_model_is_fetched_once_without_pickles_and_then_read_offline(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    cases = [
        {"hub_id": "team/tiny"},
        {"hub_id": "team/unknown"},
        {"hub_id": "gated/model"},
        {"hub_id": "drops/model"},
        {"hub_id": "team/tiny", "revision": "v9"},
        {"hub_id": "not a name"},
    ]
    loaded, unknown, gated, dropped, revision, invalid = run(home, cases, HF_ENDPOINT=hub.url)
    expected = tiny("llama")(tokens(20)).logits[0, -1, 7].item()
    assert loaded == {"source": f"team/tiny@{COMMIT}", "logit": pytest.approx(expected, abs=1e-6)}
    assert len([name for name in hub.fetched if name.endswith(".safetensors")]) > 1
    assert not set(hub.fetched) & set(UNWANTED)
    assert "model.hub_id=team/unknown" in unknown["error"] and "model.path=FOLDER" in unknown["error"]
    assert "licence" in gated["error"] and "hf auth login" in gated["error"]
    assert "not reachable" in dropped["error"] and "hf download drops/model" in dropped["error"]
    assert "model.revision=v9" in revision["error"]
    assert "model.hub_id=not a name" in invalid["error"]

    hub.fetched.clear()
    cached, absent = run(home, [{"hub_id": "team/tiny"}, {"hub_id": "team/other"}], HF_HUB_OFFLINE="1")
    assert cached == loaded and not hub.fetched
    assert "hf download team/other" in absent["error"] and "smollm2-135m" in absent["error"]


def test_hub_model_with_pickles_only_is_refused(hub: Hub, tmp_path: Path) -> None:
    for path in hub.folder.glob("model*.safetensors*"):
        path.unlink()
    (answer,) = run(tmp_path / "home", [{"hub_id": "team/tiny"}], HF_ENDPOINT=hub.url)
    assert "no *.safetensors" in answer["error"]
    assert not set(hub.fetched) & set(UNWANTED)
