"""Every command of the README and of docs/ is one that the programs accept; every study's grid can be made."""

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from src.config import compose as config
from src.config.cells import grid
from tests.support.cli import call

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    blocks = [block for text in TEXTS for block in re.findall(r"```bash\n(.*?)```", text.read_text(), re.DOTALL)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in dict.fromkeys(lines) if re.match(r"python -m src\.(run|sweep|bench|calibrate) ", line)]


def test_there_are_some() -> None:
    assert len(commands()) >= 13


@pytest.mark.parametrize("command", [c for c in commands() if "mine/" not in c and "--help" not in c])
def test_command_composes(command: str) -> None:
    """`mine/` is a folder of the reader's; tests/test_add_policy.py runs that example."""
    _, _, module, *arguments = shlex.split(command, comments=True)
    if "-m" in arguments:  # one job of a multirun, its lists cut to their first value
        arguments = [a if "[" in a else re.sub(r",.*", "", a) for a in arguments if a != "-m" and "cluster=" not in a]
    shown = call(module.removeprefix("src."), *arguments, "--cfg", "job")
    assert shown.code == 0, shown.err


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_is_a_grid(path: Path) -> None:
    config.register_tasks()
    with config.composing():
        cfg = config.compose("sweep", overrides=[f"experiment={path.stem}"])
    cells = grid(OmegaConf.to_container(cfg.policies), OmegaConf.to_container(cfg.budgets))
    assert len(cells) >= 8 and len({(c.shown, c.budget) for c in cells}) == len(cells)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(text: Path) -> None:
    found = re.findall(r"\]\(((?!http)[^)#]+)\)", text.read_text())
    assert all((text.parent / target).exists() for target in found), found
