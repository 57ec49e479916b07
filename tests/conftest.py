"""Shared fixtures: the real benchmark rows that live beside a checkout at the maintainers' place."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
    """One thread for tiny models: they are faster so, far more on a busy machine. The real weights get all."""
    torch.set_num_threads((os.cpu_count() or 1) if request.node.get_closest_marker("slow") else 1)
