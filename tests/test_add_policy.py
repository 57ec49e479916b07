"""A policy of one's own is one Python file and one YAML, and nothing in the repository changes.

The two files are tests/data/new_policy/; the README shows them word for word.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import ROOT, call, folders, lines, predictions

SOURCE = ROOT / "tests" / "data" / "new_policy"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A researcher's own folder."""
    folder = tmp_path / "my policies"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def status() -> str:
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "status", "--porcelain"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_two_files_about_fifty_lines() -> None:
    files = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sorted(path.name for path in files) == ["key_norm.py", "key_norm.yaml"]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 50


def test_readme_shows_these_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```python\n{(SOURCE / 'key_norm.py').read_text()}```" in readme
    assert f"```yaml\n{(SOURCE / 'conf' / 'policy' / 'key_norm.yaml').read_text()}```" in readme


def test_run_and_sweep(base: list[str], mine: Path, tmp_path: Path) -> None:
    before = status()
    environment = {**os.environ, "PYTHONPATH": str(mine), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "src.run", "--config-dir", str(mine / "conf"), *base]
    command += ["policy=key_norm", "budget=40", "max_new_tokens=20"]
    alone = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert alone.returncode == 0, alone.stderr
    folder = Path(alone.stdout.splitlines()[-1].removeprefix("results: "))
    assert folder.name.startswith("key_norm-40-")
    for record in lines(folder):
        assert record["kept"] == {"prompt": 40, "end": 40}  # and its `evict` held the budget while decoding
    assert status() == before

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(mine))
        policies = "policies=[h2o,key_norm,{name: key_norm, window: 8}]"
        arguments = [*base, policies, "budgets=[40]", "max_new_tokens=20", f"output_root={tmp_path / 'swept'}"]
        swept = call("sweep", "--config-dir", str(mine / "conf"), *arguments)
        assert swept.code == 0, swept.err
        found = folders(swept.folder)
        assert len(found) == 3 and predictions(found[folder.name]) == predictions(folder)

        wrong = call("sweep", "--config-dir", str(mine / "conf"), *arguments, "policies=[{name: key_norm, windw: 8}]")
        assert wrong.code == 2 and "windw" in wrong.err and "valid: window, allocate" in wrong.err
        small = call("run", "--config-dir", str(mine / "conf"), *base, "policy=key_norm", "budget=16")
        assert small.code == 2 and "17 or more" in small.err
        listed = call("run", "--config-dir", str(mine / "conf"), "--help")
        assert listed.code == 0 and "key_norm" in listed.out
    assert status() == before


def test_search_path_instead_of_a_flag(base: list[str], mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine))
    path = f"hydra.searchpath=['file://{mine / 'conf'}']"
    done = call("sweep", path, *base, "policies=[key_norm]", "budgets=[40]", "limit=1")
    assert done.code == 0, done.err
    assert next(iter(folders(done.folder))).startswith("key_norm-40-")


def test_a_class_that_is_no_policy(base: list[str], mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine))
    yaml = mine / "conf" / "policy" / "broken.yaml"
    for target, said in (("key_norm.Missing", "key_norm.Missing"), ("builtins.dict", "not a policies.base.Policy")):
        yaml.write_text(f"name: broken\n_target_: {target}\n")
        done = call("run", "--config-dir", str(mine / "conf"), *base, "policy=broken")
        assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1, done.err


def test_the_readme_shows_these_files() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in ("key_norm.py", "conf/policy/key_norm.yaml"):
        assert (SOURCE / path).read_text() in readme
