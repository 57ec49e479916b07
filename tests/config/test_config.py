"""Every file under conf/ composes, says what its keys mean, and `--help` and `--cfg` show it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from evals.suites import SUITES, task_names
from policies.base import Policy
from policies.parts import Part
from src.config import compose as composed
from src.config.cells import PARTS, make_cell
from src.config.settings import read_settings
from tests.support.cli import call

CONF = composed.CONF
NAMES = {
    group: sorted(p.stem for p in (CONF / group).glob("*.yaml") if p.stem[0] != "_") for group in ("policy", "model")
}
FOUND_OUT = {"loaded", "words", "decode", "horizon"}  # fields that no user sets: the model and the prompt do
UNEXPLAINED = {"name", "_target_", "defaults"}  # what a file is; its headline says so


@pytest.fixture(autouse=True)
def tasks_registered() -> None:
    composed.register_tasks()


def compose(config: str, *overrides: str) -> Any:
    with composed.composing():
        cfg = composed.compose(config, overrides=list(overrides))
    read_settings(config, cfg)
    return cfg


def test_the_command_that_users_type() -> None:
    shown = call("run", "policy=ahakv", "model=llama3-8b", "budget=512", "--cfg", "job")
    assert shown.code == 0, shown.err
    cfg = yaml.safe_load(shown.out)
    assert (cfg["policy"]["name"], cfg["model"]["name"], cfg["budget"]) == ("ahakv", "llama3-8b", 512)
    for switch in ("recent_accumulation", "step_gain", "value_prior"):
        assert compose("config", "policy=ahakv", f"policy.{switch}=false").policy[switch] is False


@pytest.mark.parametrize("name", NAMES["policy"])
def test_policies_compose(name: str) -> None:
    """Composed and made, with every setting of the class in the file, at the class's own default."""
    cfg = compose("config", f"policy={name}")
    cell = make_cell(cfg.policy, 256)
    made = cell.variant.policy
    assert isinstance(made, Policy) and cell.label == cfg.policy.name == name
    written = {k: v for k, v in OmegaConf.to_container(cfg.policy, resolve=True).items() if k != "name"}  # type: ignore[union-attr]
    assert written == as_settings(made)
    own = {k: v for k, v in written.items() if k not in ("_target_", *PARTS)}
    defaults = vars(type(made)())
    if own.keys() == written.keys() - {"_target_"}:  # else a method put together from parts, with a class of another's
        assert {k for k in own if own[k] != defaults[k]} <= {"strategy"}  # one class, a file for each strategy


def as_settings(made: Any) -> Any:
    """A policy or a part as a YAML file says it."""
    if not isinstance(made, Policy | Part):
        return made
    found = {k: as_settings(v) for k, v in vars(made).items() if k not in FOUND_OUT}
    found = {k: v for k, v in found.items() if v is not None or k not in PARTS}
    return {"_target_": f"{type(made).__module__}.{type(made).__qualname__}", **found}


@pytest.mark.parametrize("name", NAMES["model"])
def test_models_compose(name: str) -> None:
    for entry in ("config", "sweep"):
        cfg = compose(entry, f"model={name}")
        assert set(yaml.safe_load((CONF / "model" / "_base.yaml").read_text())) <= set(cfg.model)


@pytest.mark.parametrize("suite", SUITES)
def test_tasks_compose(suite: str) -> None:
    cfg = compose("config", f"tasks={suite}")
    assert cfg.tasks.suite.startswith(suite.partition("_")[0])
    for name in task_names(suite):
        one = compose("sweep", f"tasks={name}")
        assert list(one.tasks.names) == [name] and name in task_names(one.tasks.suite)


def test_experiments_compose() -> None:
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        config = "sweep" if "policies" in path.read_text() else "config"
        compose(config, f"experiment={path.stem}")


def keys(path: Path) -> list[tuple[str, str]]:
    """(key, its line and the comments around it) of every key, those of lists and of a model's shape left out."""
    found, shape = [], False
    rows = ["", *path.read_text(encoding="utf-8").splitlines(), ""]
    for above, line, below in zip(rows, rows[1:], rows[2:], strict=False):
        if line[:1] not in (" ", "#", ""):
            shape = line.startswith("shape:")
        text = line.strip()
        if text and not text.startswith(("#", "-")) and ":" in text and not (shape and line[0] == " "):
            around = [neighbour for neighbour in (above, below) if neighbour.lstrip().startswith("#")]
            found.append((text.partition(":")[0], "\n".join([line, *around])))
    return found


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_is_explained(path: Path) -> None:
    """On its line or the one above; for a model also in _base.yaml; for hydra's own keys by hydra."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith(("#", "# @package")), "no headline"
    known = {key for key, _ in keys(CONF / "model" / "_base.yaml")} if path.parent.name == "model" else set()
    if path.stem == "_base":
        known = set()
    hydra = text.partition("\nhydra:")[2]
    for key, explained in keys(path):
        line = explained.splitlines()[0]
        if (
            not line.endswith(":") and line not in hydra and key not in UNEXPLAINED | known
        ):  # "model:" has keys of its own
            assert "#" in explained, f"{path.name}: {key} has no comment"


@pytest.mark.parametrize("entry", ["run", "sweep"])
def test_help(entry: str) -> None:
    """Names every choice and explains every setting."""
    shown = call(entry, "--help")
    assert shown.code == 0 and "powered by Hydra" not in shown.out
    words = shown.out.replace(",", " ").split()
    for name in [*NAMES["policy"], *NAMES["model"], *task_names("longbench"), *task_names("pocket")]:
        assert name in words, name
    assert "_base" not in words
    top = [
        *yaml.safe_load((CONF / "common.yaml").read_text()),
        *yaml.safe_load((CONF / f"{ENTRY[entry]}.yaml").read_text()),
    ]
    for key in set(top) - {"hydra", "defaults"}:
        line = next(line for line in shown.out.splitlines() if line.startswith(f"  {key}:"))
        assert "#" in line, line
    assert f"python -m src.{entry} " in shown.out and "Exit codes" in shown.out
    assert all(len(line) <= 150 for line in shown.out.splitlines())


ENTRY = {"run": "config", "sweep": "sweep"}


def test_help_of_a_policy() -> None:
    shown = call("run", "policy=snapkv", "--help")
    assert "Options of policy=snapkv" in shown.out and "kernel: 7" in shown.out and "heavy_share" not in shown.out


def test_settings_are_plain_json(base: list[str]) -> None:
    """settings.json, which the folder's name is the hash of, holds the policy's options and no path of this run."""
    done = call("run", *base, "policy=ahakv", "budget=0.25", "limit=1", "retention=off")
    written = json.loads((done.folder / "settings.json").read_text())
    assert written["policy"]["window"] == 32 and written["budget"] == 0.25 and written["model"]["dtype"] == "float32"
    assert not {"tasks", "limit", "lanes", "output_root", "wandb"} & set(written)


@pytest.mark.parametrize(
    ("part", "name"),
    [(part, path.stem) for part in PARTS for path in sorted((CONF / "policy" / part).glob("[!_]*.yaml"))],
)
def test_parts_compose(part: str, name: str) -> None:
    """Beside a policy, with every setting of the class in the file; the cell is called after both."""
    cfg = compose("config", "policy=snapkv", f"policy/{part}={name}")
    cell = make_cell(cfg.policy, 256)
    made, settings = getattr(cell.variant.policy, part), OmegaConf.to_container(cfg.policy[part])
    assert cell.label == f"snapkv+read_{name}" if part == "read" else f"snapkv+{name}"  # allocate=mass is another
    assert {k: v for k, v in settings.items() if k != "name"} == as_settings(made)  # type: ignore[union-attr]
    assert getattr(made, "base", None) or made == type(made)()
