"""Damaged files of a run's folder: no traceback, and no table that differs without a word.

`make test-damage` tries 400; DAMAGES=n sets another number.
"""

import os
from pathlib import Path

import pytest

from tests.support.damage import Command, Study, command, make, try_damage

COUNT = int(os.environ.get("DAMAGES", "40"))


@pytest.fixture(scope="module")
def sweep(model_folder: Path) -> Command:
    base = ["model=local", f"model.path={model_folder}", "model.max_prompt_tokens=200", "tasks=pocket"]
    return command([*base, "max_new_tokens=8", "wandb.mode=disabled"])


@pytest.fixture(scope="module", params=["finished", "unfinished"])
def study(request: pytest.FixtureRequest, sweep: Command, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make(sweep, tmp_path_factory.mktemp("damage") / "runs", request.param == "finished")


def test_random_damage_is_said_and_mended(study: Study, tmp_path: Path) -> None:
    """Report, the same command again, report: half of the damages to a finished study, half to an unfinished one."""
    wrong = [line for seed in range(COUNT // 2) for line in try_damage(study, tmp_path, seed)]
    assert not wrong, "\n".join(wrong)
