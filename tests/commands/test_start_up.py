"""What needs no model answers at once: a help text or a wrong setting never waits for the heavy libraries."""

import re
import subprocess
import sys

import pytest

from tests.support.cli import ROOT

HEAVY = {"torch", "transformers", "datasets", "nltk", "pandas", "matplotlib"}
HELP = ["run", "sweep", "bench", "calibrate", "report", "study"]
WRONG = {
    # command: what its one line names
    "run policy=nonsense": "policy=nonsense",
    "run budgt=12": "budgt",
    "run budget=-3": "budget=-3",
    "run limit=abc": "limit=abc",
    "run tasks.names=[foo]": "tasks.names=foo",
    "run +tasks.reference_rows=true": "tasks.reference_rows",
    "run wandb.mode=foo": "wandb.mode=foo",
    "run model.dtype=int8": "model.dtype=int8",
    "run model=random model.like=foo": "model.like=foo",
    "run experiment=demo": "policies=",
    "sweep policies=[foo]": "policy=foo",
    "sweep policies=[{name:snapkv,kernl:1}]": "'kernl'",
    "sweep budgets=[40,abc]": "budget=abc",
    "bench parts=[foo]": "parts=['foo']",
    "calibrate seed=-1": "seed=-1",
    "report --nonsense": "DIR",
    "study --resamples many": "many",
}


def loaded(*command: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """How `python -m src.<command>` ends, its stderr without Python's own lines, and which packages it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    listed = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.M)
    done.stderr = re.sub(r"^import time:.*\n", "", done.stderr, flags=re.M)
    return done, {name.partition(".")[0] for name in listed}


@pytest.mark.parametrize("name", HELP)
def test_help_imports_nothing_heavy(name: str) -> None:
    done, packages = loaded(f"src.{name}", "--help")
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr
    assert "src" in packages and not HEAVY & packages


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_setting_imports_nothing_heavy(command: str) -> None:
    name, *arguments = command.split()
    done, packages = loaded(f"src.{name}", *arguments)
    assert done.returncode == 2 and not done.stdout, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and WRONG[command] in done.stderr
    assert "src" in packages and not HEAVY & packages
