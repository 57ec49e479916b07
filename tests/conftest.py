"""Shared fixtures: the real benchmark rows that live beside a checkout at the maintainers' place."""

import gc
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from src.retention.plot import plot_retention
from tests.support.file_server import FileServer

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """The collector leaves what all imports made alone from here on: it took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("data/longbench")`: that folder, or a skip with the reason (in CI: a failure)."""

    def locate(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            message = f"needs {name} in a `shared` folder beside the checkout (benchmark assets, never committed)"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        return path

    return locate


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models: they are faster so, far more on a busy machine. The real weights get what is free."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    mine = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(mine if request.node.get_closest_marker("slow") else 1)


@pytest.fixture(scope="session", autouse=True)
def written_pictures() -> Iterator[None]:
    """A run's picture takes longer than a tiny run: here it is a file and no more, but in processes of their own."""
    drawn: Callable[..., Any] = lambda data, path, title: path.write_bytes(b"drawn")  # noqa: E731
    with mock.patch("src.records.folder.plot_retention", drawn):
        yield


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test is marked so, they are drawn."""
    if request.node.get_closest_marker("pictures"):
        monkeypatch.setattr("src.records.folder.plot_retention", plot_retention)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer, saved for `model=local`."""
    from tests.support.tiny import tiny, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run or sweep that takes well under a second and writes to `tmp_path / "results"`."""
    return [
        "model=local",
        f"model.path={model_folder}",
        "model.max_prompt_tokens=200",
        "tasks=needle",
        "limit=2",
        "max_new_tokens=8",
        "wandb.mode=disabled",
        f"output_root={tmp_path / 'results'}",
    ]


@pytest.fixture
def hub() -> Iterator[tuple[str, type[FileServer]]]:
    """Its address, and the class that holds its files."""
    handler = type("OneServer", (FileServer,), {"files": {}, "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()
