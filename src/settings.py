"""Configuration: compose it, turn Hydra's complaints into one line, make policies and cells out of it."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evals.errors import DataError
from evals.suites import task_names
from evals.visible import one_line, reason
from src.checks import RULES
from src.checks import shown as as_typed
from src.cluster import EXTRAS, Outcome, distributed, report, run_job
from src.command_line import GROUPS, check_arguments, only_known_targets, unreadable
from src.errors import InputError
from src.files import no_room
from src.help import register_help
from src.jobs import Budget, SplitBudget, Variant
from src.targets import make_policy

CONF = Path(__file__).resolve().parents[1] / "conf"
SUITES = ("pocket", "longbench", "longgenbench")
LISTS = {  # what sweeps ask for, checked where the grid is made
    "policies": "a list, e.g. policies=[h2o,snapkv]",
    "budgets": "a list, e.g. budgets=[128,256]",
}
LONGEST_NAME = 100  # characters of a policy's name: it is part of file names
MOST = 2**31 - 1  # entries of a budget; positions are 32-bit numbers
INTERRUPTED = 130  # the exit code of whatever Ctrl-C has ended


@dataclass(frozen=True)
class CellConfig:
    """One policy at one budget, with the settings it was made from (they go into the results folder's hash)."""

    label: str  # the policy's name
    settings: dict[str, Any]
    variant: Variant
    shown: str = ""  # the name with the options that were changed, for people
    found: dict[str, Any] = field(default_factory=dict)  # what the policy took from elsewhere (`Policy.fingerprint`)

    @property
    def budget(self) -> int | float | None:
        """One number for tables: of a budget in two parts their sum, or the prompt's part if one is a share."""
        budget = self.variant.budget
        if not isinstance(budget, SplitBudget):
            return budget
        both = isinstance(budget.prompt, int) and isinstance(budget.decode, int)
        return budget.prompt + budget.decode if both else budget.prompt

    @property
    def given(self) -> Any:
        """The budget as a command would give it."""
        budget = self.variant.budget
        return asdict(budget) if isinstance(budget, SplitBudget) else budget

    @property
    def options(self) -> dict[str, Any]:
        """The policy's settings as a command would give them."""
        return {name: value for name, value in self.settings.items() if name != "decode_budget"}

    @property
    def budget_name(self) -> str:
        """In folder names: `all` without a budget, `256+64` in two parts."""
        budget = self.variant.budget
        return "all" if budget is None else f"{budget:g}" if isinstance(budget, float) else str(budget)


def main(config_name: str, job: Callable[[DictConfig], int]) -> int:
    """Run `job` under Hydra, once or for `-m` many times, and turn what goes wrong into one line on stderr.

    Returns:
        The exit code, the largest of all jobs': 0, 1 (samples failed), 2 (a setting or an input is wrong).
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions
    register_tasks()
    register_help()
    codes: list[int] = []
    begun: list[DictConfig] = []

    def collect(cfg: DictConfig) -> int | Outcome:
        begun.append(cfg)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            outcome = run_job(job, cfg)
            if distributed():
                return outcome  # to the launcher, in the process that the user started
            codes.append(report([HydraConfig.get().job.override_dirname.replace(",", " ")], outcome))
        else:
            try:
                codes.append(job(cfg))
            except (InputError, DataError) as error:
                codes.append(complain(str(error)))
            except OmegaConfBaseException as error:
                codes.append(complain(explain(error, config_name, sys.argv[1:])))
            except OSError as error:
                if (why := no_room(error)) is None:
                    raise
                codes.append(complain(why))
        if codes[-1] == INTERRUPTED:
            raise KeyboardInterrupt  # ends the jobs that were to follow, too
        return codes[-1]

    collect.__module__, collect.__qualname__ = job.__module__, job.__qualname__
    collect.codes = codes  # type: ignore[attr-defined]  # where a launcher of hydra_plugins/ adds its jobs' codes
    try:
        check_arguments(sys.argv[1:], config_name)
        with only_known_targets():
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(collect)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        return complain(explain(error, config_name, sys.argv[1:]))
    except InputError as error:  # of a launch
        return complain(str(error))
    except (ValueError, OSError, RecursionError) as error:
        if begun:
            raise  # a programming error; before any job it is an override or a file that Hydra cannot take
        return complain(explain(error, config_name, sys.argv[1:]))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # Hydra ends so after --help
        return int(end.code or 0)
    return max(codes, default=0)


def complain(message: str) -> int:
    """One line on stderr; returns the exit code for it."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def register_tasks() -> None:
    """`tasks=hotpotqa` and every other single task, as a config that narrows its suite's."""
    store = ConfigStore.instance()
    for suite in SUITES:
        for name in task_names(suite):
            if not (CONF / "tasks" / f"{name}.yaml").exists():
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
    wanted = RULES[name][1] if name in RULES else LISTS.get(name, "")
    return f"{given}: {message if not wanted else 'not of this kind'}" + (f"; valid: {wanted}" if wanted else "")


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


def policy_config(spec: str | Mapping[str, Any], seed: int = 0) -> DictConfig:
    """`snapkv` or `{name: snapkv, kernel: 1}` as the composed config of that policy.

    Args:
        seed: the run's, for policies that draw random numbers.

    Raises:
        InputError: an unknown policy or option; the valid ones are named.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w./-]+", name):
        problem = "has no name" if name is None else f"has name={name}"
        raise InputError(f"policies: {spec} {problem}; valid: a policy's name or {{name: ..., option: value}}")
    overrides = [f"policy={name}", f"seed={seed}"]
    if HydraConfig.initialized():  # a folder of the user's own policies
        sources = HydraConfig.get().runtime.config_sources
        extra = [f"{s.schema}://{s.path}" for s in sources if s.provider not in ("hydra", "main", "schema")]
        if extra:
            overrides.append("hydra.searchpath=[" + ",".join(map(quoted, extra)) + "]")
    try:
        with composing():
            node = compose("config", overrides=overrides).policy
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(explain(error, "config", [])) from None
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise InputError(f"policy={name}: its configuration has no _target_; valid: _target_: module.Class")
    unknown = sorted(set(options) - set(node))
    if unknown:
        valid = ", ".join(sorted(str(k) for k in node if k not in ("name", "_target_")))
        raise InputError(f"policies: {name} has no option {unknown[0]!r}; valid: {valid or 'none'}")
    return OmegaConf.merge(node, options)  # type: ignore[return-value]


def quoted(value: str) -> str:
    """For Hydra's override grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def make_cell(policy: DictConfig, budget: Budget | None, shown: str = "") -> CellConfig:
    """The policy object and its label; `policy` is a config with `name` and `_target_`.

    Raises:
        InputError: a value that the policy does not take.
    """
    settings: dict[str, Any] = OmegaConf.to_container(policy, resolve=True)  # type: ignore[assignment]
    name = settings.pop("name", str(settings.get("_target_") or chosen_policy()).rpartition(".")[2].lower())
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise InputError(f"policy.name={as_typed(name)}: valid: a name of 1 to {LONGEST_NAME} printable characters")
    made = make_policy(settings, name)
    settings = {"name": name, **settings}
    if isinstance(budget, SplitBudget) and made.uses_budget:
        settings["decode_budget"] = budget.decode
        shown = f"{shown or name} decode={budget.decode:g}"
    return CellConfig(name, settings, Variant(made, budget if made.uses_budget else None), shown or name)


def chosen_policy() -> str:
    """What `policy=` was given, for messages about a file that says no name."""
    return str(HydraConfig.get().runtime.choices.get("policy")) if HydraConfig.initialized() else "policy"


def parse_budget(value: Any) -> Budget:
    """A budget as given: entries above 1, a share of the prompt up to 1 (1 is all of it), or {prompt: .., decode: ..}.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, Mapping):
        if set(value) != {"prompt", "decode"}:
            raise InputError(f"budget={dict(value)}: valid in two parts: {{prompt: .., decode: ..}}")
        return SplitBudget(parse_number(value["prompt"]), parse_number(value["decode"]))
    return parse_number(value)


def parse_number(value: Any) -> int | float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (value > 1 and value != int(value)):
        raise InputError(
            f"budget={value}: valid: entries per layer and KV head (2, 3, ...) or a share of the prompt in (0, 1]"
        )
    if value > MOST:
        raise InputError(f"budget={value}: valid: at most {MOST} entries; policy=full keeps everything")
    return float(value) if value <= 1 else int(value)
