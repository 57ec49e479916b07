"""What a configuration may name and what it may not: nothing but a policy's class is called, and every wrong file,
setting or flag is one line."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Result, call, folders, lines, predictions

MODULE = """
from dataclasses import dataclass

from policies.base import Policy, ScorePolicy
from policies.h2o import H2O


class Silent(H2O):
    def __post_init__(self):
        assert False


class Least(H2O):
    def least_budget(self):
        return "two"


class Flag(H2O):
    may_refuse = 1


class Outer:
    class Inner(H2O):
        pass


def factory():
    return H2O()


class Unbound(H2O):
    def bind(self, model):
        raise RuntimeError("no bond")


class Bad(H2O):
    def evict(self, step, state):
        return 1 // 0


class Cheat(H2O):
    def measures(self, states, lane):
        return {"score": 100.0}
"""
BAD_YAML: dict[str, tuple[str | bytes, list[str]]] = {
    "malformed": ("name: x\n  _target_: [unclosed\n", ["malformed.yaml, line 2"]),
    "tagged": ("!!python/object/apply:os.mkdir [tagged]\n", ["tagged.yaml, line 1", "os.mkdir"]),
    "twice": ("name: x\nname: y\n", ["twice.yaml, line 2", "duplicate"]),
    "empty": ("", ["policy=empty", "_target_"]),
    "untargeted": ("name: untargeted\nwindow: 3\n", ["policy=untargeted", "_target_"]),
    "latin": (b"name: \xe9\xff\n", ["latin.yaml", "UTF-8"]),
    "number": ("3\n", ["policy=number"]),
    "names": ("name: [a, b]\n_target_: policies.h2o.H2O\n", ["policy.name=['a', 'b']", "a name"]),
    "nomod": ("name: nomod\n_target_: doesnotexist.Thing\n", ["policy=nomod", "No module named 'doesnotexist'"]),
    "syntax": ("name: x\n_target_: broken_syntax.X\n", ["policy=x", "broken_syntax.X", "SyntaxError"]),
    "leaves": ("name: x\n_target_: leaves_the_process.X\n", ["policy=x", "SystemExit"]),
    "silent": ("name: silent\n_target_: own_policies.Silent\n", ["policy=silent", "AssertionError"]),
    "least": ("name: least\n_target_: own_policies.Least\n", ["policy=least", "least_budget() gives 'two'"]),
    "flag": ("name: flag\n_target_: own_policies.Flag\n", ["policy=flag", "may_refuse=1", "True, False"]),
    "abstract": ("name: x\n_target_: own_policies.Policy\n", ["does not define keep_prompt"]),
    "factory": ("name: x\n_target_: own_policies.factory\n", ["is not a policies.base.Policy"]),
    "nodot": ("name: x\n_target_: H2O\n", ["_target_=H2O", "module.Class"]),
    "listed": ("name: x\n_target_: [policies.h2o.H2O]\n", ["_target_=['policies.h2o.H2O']"]),
    "bytes": ("name: x\n_target_: policies.h2o.H2O\nheavy_share: !!binary aGk=\n", ["heavy_share"]),
    "unbound": (
        "name: unbound\n_target_: own_policies.Unbound\n",
        ["policy=unbound", "bind raised RuntimeError: no bond"],
    ),
    "callback": (
        "# @package _global_\nhydra: {callbacks: {x: {_target_: os.mkdir, path: called}}}\n",
        ["hydra.callbacks", "os.mkdir"],
    ),
    "handler": (
        "# @package _global_\n"
        "hydra: {job_logging: {version: 1, root: {}, handlers: {x: {(): os.mkdir, path: called}}}}\n",
        ["hydra.job_logging.handlers.x.()=os.mkdir"],
    ),
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: `own_policies.py`, modules that cannot be imported, and `conf/policy/`."""
    folder = tmp_path / "mine"
    (folder / "conf" / "policy").mkdir(parents=True)
    (folder / "own_policies.py").write_text(MODULE)
    (folder / "broken_syntax.py").write_text("def x(:\n")
    (folder / "leaves_the_process.py").write_text("raise SystemExit(0)\n")
    for name in ("bad", "cheat"):
        text = f"name: {name}\n_target_: own_policies.{name.capitalize()}\nheavy_share: 0.5\n"
        (folder / "conf" / "policy" / f"{name}.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "own_policies", raising=False)
    return folder


def refused(done: Result, *words: str) -> None:
    assert done.code == 2 and not done.out, done.out + done.err
    assert len(done.err.splitlines()) == 1 and done.err.startswith("error: "), done.err
    for word in words:
        assert word in done.err, f"{word!r} is not in: {done.err}"


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_file_that_cannot_be_used(base: list[str], mine: Path, tmp_path: Path, name: str) -> None:
    text, words = BAD_YAML[name]
    path = mine / "conf" / "policy" / f"{name}.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(call("run", "--config-dir", str(mine / "conf"), *base, f"policy={name}", "budget=40"), *words)
    if "@package" not in str(text):
        grid = [f"policies=[h2o,{name}]", "budgets=[40]"]
        done = call("sweep", "--config-dir", str(mine / "conf"), *base, *grid)
        refused(done, *[word for word in words if "policy=number" not in word])
    assert not (tmp_path / "results").exists() and not Path("called").exists() and not Path("tagged").exists()


def test_a_class_within_a_class(base: list[str], mine: Path) -> None:
    (mine / "conf" / "policy" / "inner.yaml").write_text("name: inner\n_target_: own_policies.Outer.Inner\n")
    done = call("run", "--config-dir", str(mine / "conf"), *base, "policy=inner", "budget=40")
    assert done.code == 0, done.err


# Nothing else is called.


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


CALLS = {
    "instead of the policy": [
        "policy=h2o",
        "policy._target_=torch.load",
        "+policy.f={file}",
        "+policy.weights_only=false",
    ],
    "a file opened": ["policy=h2o", "policy._target_=builtins.open", "+policy.file={made}", "+policy.mode=w"],
    "in an option": ["policy=h2o", "policy.heavy_share={{_target_: torch.load, f: {file}, weights_only: false}}"],
    "in a policy's option": ["policy=scope_slide", "policy.prompt={{_target_: pickle.load, file: {file}}}"],
    "deeper": ["policy=scope_slide", "policy.prompt={{a: [{{_target_: os.mkdir, path: {made}}}]}}"],
    "within a policy": [
        "policy=scope_slide",
        "policy.prompt={{_target_: policies.h2o.H2O, heavy_share: {{_target_: os.mkdir, path: {made}}}}}",
    ],
    "partial": ["policy=h2o", "+policy._partial_=true"],
    "positional": ["policy=h2o", "+policy._args_=[0.5]"],
    "a launcher": ["policy=h2o", "hydra.launcher._target_=os.mkdir"],
    "in a launcher": ["policy=h2o", "-m", "+hydra.launcher.x={{_target_: os.mkdir, path: {made}}}"],
    "in a sweeper": ["policy=h2o", "-m", "hydra.sweeper.params={{_target_: os.mkdir, path: {made}}}"],
    "a callback": ["policy=h2o", "+hydra.callbacks.x={{_target_: os.mkdir, path: {made}}}"],
    "a handler": ["policy=h2o", "hydra/job_logging=default", "+hydra.job_logging.handlers.x.class=os.mkdir"],
    "a stream": ["policy=h2o", "hydra/job_logging=default", "+hydra.job_logging.x=ext://os.environ"],
}


@pytest.mark.parametrize("kind", CALLS)
def test_nothing_but_a_policy_is_called(base: list[str], tmp_path: Path, kind: str) -> None:
    made, file = tmp_path / "made", tmp_path / "bomb.pt"
    file.write_bytes(pickle.dumps(Bomb(made)))
    arguments = [argument.format(made=made, file=file) for argument in CALLS[kind]]
    refused(call("run", *base, *arguments, "budget=40"))
    assert not made.exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize("target", ["torch.load", "os.mkdir", "policies.base.keep_all", "policies.base.State"])
def test_nor_from_a_sweep_s_list(base: list[str], target: str) -> None:
    grid = ["policies=[full,{name: h2o, _target_: " + target + "}]", "budgets=[40]"]
    refused(call("sweep", *base, *grid), "policy=h2o", target, "policies.base.Policy")


# Settings and flags.

SETTINGS: dict[str, list[str]] = {
    "policy=[h2o,snapkv]": ["policy=[h2o,snapkv]", "src.sweep policies=[h2o,snapkv]"],
    "model=[a,b]": ["model=[a,b]", "one name"],
    "model.template_kwargs=[1]": ["model.template_kwargs=[1]", "a mapping"],
    "model.stop_tokens={a: 1}": ["model.stop_tokens={a: 1}", "a list of names"],
    "model.name=[1]": ["model.name=[1]", "a name"],
    "model.layers=1": ["model.layers=1", "model=random"],
    "policy.name=null": ["policy.name=null", "a name"],
    "policy.name=[a]": ["policy.name=['a']", "a name"],
    "budget=${budget}": ["budget=${budget}", "Recursive interpolation"],
    "budget=${nothing}": ["budget=${nothing}", "'nothing' not found"],
    "budget=10000000000000000000000": ["budget=10000000000000000000000", "2147483647"],
    "budget=1e22": ["budget=1e+22", "2147483647"],
    "lanes=10000000000000000000000": ["lanes=10000000000000000000000", "whole number"],
    "~budget": ["~budget", "budget=VALUE"],
    "~policy.window": ["~policy.window", "policy.window=VALUE"],
    "=3": ["=3", "name=value"],
    "policy.decay=nan": ["decay=nan", "finite"],
    "policy.decay=inf": ["decay=inf", "finite"],
    "--config-name=nope": ["--config-name=nope", "conf/config.yaml"],
    "--config-name=sweep": ["--config-name=sweep", "conf/config.yaml"],
    "--config-dir=/no/such/folder": ["--config-dir=/no/such/folder", "no such folder"],
    "--nosuchflag": ["--nosuchflag", "--hydra-help"],
    "--cfg=nope": ["--cfg", "nope"],
}
GRIDS: dict[str, list[str]] = {
    "policies={a: 1}": ["policies={a: 1}", "a list"],
    "budgets={a: 1}": ["budgets={a: 1}", "a list"],
    "policies=[{name: [h2o]}]": ["policies", "name=['h2o']", "a policy's name"],
    "policies=[{name: null}]": ["policies", "no name"],
    "policies=[{name: 'h2o,snapkv'}]": ["policies", "h2o,snapkv", "a policy's name"],
    "policies=[{name: h2o, heavy_share: nan}]": ["heavy_share=nan", "finite"],
    "budgets=[40,10000000000000000000000]": ["budget=10000000000000000000000", "2147483647"],
}


@pytest.mark.parametrize("argument", SETTINGS)
def test_settings(base: list[str], tmp_path: Path, argument: str) -> None:
    refused(call("run", *base, "budget=40", argument), *SETTINGS[argument])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("argument", GRIDS)
def test_grids(base: list[str], tmp_path: Path, argument: str) -> None:
    refused(call("sweep", *base, "policies=[h2o]", "budgets=[40]", argument), *GRIDS[argument])
    assert not (tmp_path / "results").exists()


def test_a_config_folder_without_configurations(base: list[str], tmp_path: Path) -> None:
    refused(call("run", f"--config-dir={tmp_path}", *base), str(tmp_path), "holds no *.yaml")


def test_a_budget_beyond_any_prompt_keeps_everything(base: list[str]) -> None:
    done = call("sweep", *base, "policies=[full,h2o,ahakv,snapkv,streaming_llm]", "budgets=[2147483647]")
    assert done.code == 0, done.err
    found = [predictions(folder) for folder in folders(done.folder).values()]
    answers = [{key: values[0] for key, values in each.items()} for each in found]
    assert len(answers) == 5 and all(each == answers[0] for each in answers)


@pytest.mark.parametrize("entry", ["run", "sweep"])
def test_help_lists_every_setting_once(entry: str) -> None:
    shown = call(entry, "--help").out.splitlines()
    names = [line.split(":")[0] for line in shown if line.startswith("  ") and line[2:3].isalpha() and ":" in line]
    settings = [name.strip() for name in names if " " not in name.strip()]
    assert "broken_rows" in settings and "limit" in settings
    for name in ("broken_rows", "limit", "budgets", "max_lanes", "lanes", "seed"):
        assert settings.count(name) <= 1, name
    default = {"run": "refuse", "sweep": "record"}[entry]
    assert any(line.strip().startswith(f"broken_rows: {default}") for line in shown)


# A policy that raises, from the command line.


def test_a_raising_policy_costs_its_own_cell_only(base: list[str], mine: Path) -> None:
    grid = ["--config-dir", str(mine / "conf"), *base, "policies=[full,bad,h2o]", "budgets=[40]", "limit=3"]
    done = call("sweep", *grid)
    assert done.code == 1 and "Traceback" not in done.err and "3 samples failed" in done.err, done.err
    said = "policy Bad: evict raised ZeroDivisionError: integer division or modulo by zero (layer 0, own_policies.py:"
    assert done.err.count(said) == 1 and "2 more like it" in done.err
    found = folders(done.folder)
    broken = next(folder for name, folder in found.items() if name.startswith("bad-40"))
    assert [record["score"] for record in lines(broken)] == [None] * 3
    assert all(said in record["error"] for record in lines(broken))
    for name, folder in found.items():
        if folder != broken:
            assert all(record["error"] is None for record in lines(folder)) and len(lines(folder)) == 3, name
    before = {name: (folder / "predictions.jsonl").read_bytes() for name, folder in found.items()}
    again = call("sweep", *grid)
    assert before == {name: (folder / "predictions.jsonl").read_bytes() for name, folder in found.items()}
    assert again.code == 1 and "3 samples failed" in again.err
    longer = call("sweep", *grid[:-1], "limit=4")
    assert longer.code == 1 and all(len(lines(folder)) == 4 for folder in found.values())


def test_a_policy_s_figure_does_not_pass_for_the_score(base: list[str], mine: Path) -> None:
    done = call("run", "--config-dir", str(mine / "conf"), *base, "policy=cheat", "budget=40")
    assert done.code == 1 and "measures gave 'score'" in done.err
    assert all(record["score"] is None for record in lines(done.folder))
