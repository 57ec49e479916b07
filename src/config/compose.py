"""Hydra's configuration of this project: composed, and its complaints turned into one line."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from evals.suites import SUITES, task_names
from evals.visible import reason
from src.config.cluster import EXTRAS
from src.config.command_line import GROUPS, unreadable
from src.config.settings import wanted

CONF = Path(__file__).resolve().parents[2] / "conf"


LISTS = {  # what sweeps ask for, checked where the grid is made
    "policies": "a list, e.g. policies=[h2o,snapkv]",
    "budgets": "a list, e.g. budgets=[128,256]",
}


def register_tasks() -> None:
    """`tasks=hotpotqa` and every other single task, as a config that narrows its suite's."""
    store = ConfigStore.instance()
    suite_of: dict[str, str] = {}
    for suite in SUITES:
        for name in task_names(suite):
            if name not in suite_of and not (CONF / "tasks" / f"{name}.yaml").exists():
                suite_of[name] = suite  # a part of a suite comes after the whole
                store.store(group="tasks", name=name, node={"defaults": [suite, "_self_"], "names": [name]})


def explain(error: Exception, config_name: str, arguments: list[str]) -> str:
    """Hydra's message as one line: the setting, its value and what would be valid."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        if extra := EXTRAS.get(str(error.missing_cfg_file)):
            return f"cluster={extra}: its launcher is not installed; install it with: pip install '.[{extra}]'"
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        valid = ", ".join(sorted(o for o in error.options or [] if not o.startswith("_"))) or "none is there"
        return f"{group or 'config'}={value}: no such configuration; valid: {valid}"
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError | OSError):
        return unreadable(error, arguments, CONF)
    empty = [a.partition("=")[0] for a in arguments if re.fullmatch(rf"({GROUPS})=(null)?", a)]
    if empty and isinstance(error, ValueError):  # Hydra's own message does not say which
        with composing():
            names = GlobalHydra.instance().config_loader().get_group_options(empty[0])
        return f"{empty[0]}=null: valid: {', '.join(name for name in names if not name.startswith('_'))}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read ({reason(error)}); valid: name=value, quoted for the shell"
    found = re.search(r"Could not override '([^']+)'", str(error))
    if found:
        name = found[1]
        parent, _, key = name.rpartition(".")
        arguments = [a for a in arguments if not a.startswith(f"{name}=")]  # a group that this command does not have
        return f"{name}: no setting named {key!r}; valid{f' in {parent}' if parent else ''}: " + valid_keys(
            config_name, parent, arguments
        )
    cause = error.__cause__ or error
    message = reason(cause)
    merged = re.search(r"Error merging override (\S+?)=", str(error))
    name = merged[1].lstrip("+") if merged else str(getattr(cause, "full_key", None) or "")
    if not name:
        return message
    given = next((a for a in reversed(arguments) if a.lstrip("+").startswith(f"{name}=")), name)
    valid = LISTS.get(name) or wanted(name)
    return f"{given}: {message if not valid else 'not of this kind'}" + (f"; valid: {valid}" if valid else "")


def valid_keys(config_name: str, parent: str, arguments: list[str]) -> str:
    """The settings beside a misspelt one: the config without the dotted overrides."""
    groups = [a for a in arguments if re.fullmatch(rf"({GROUPS})=[^,\[{{]+", a)]
    with composing():
        cfg = compose(config_name, overrides=groups, return_hydra_config=parent.startswith("hydra"))
    node = OmegaConf.select(cfg, parent) if parent else cfg
    keys = [str(k) for k in node if not str(k).startswith("_")] if isinstance(node, DictConfig) else []
    return ", ".join(sorted(keys)) or "none"


class composing:
    """Hydra's compose API over this project's `conf/`, whether or not a Hydra job is running."""

    def __enter__(self) -> None:
        self._before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        self._context = initialize_config_dir(str(CONF), version_base="1.3")

    def __exit__(self, *_: object) -> None:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = self._before
