"""Cells: one policy at one budget, made out of the settings; a sweep's grid of them.

A policy's class brings torch, which takes seconds; it is imported when the first cell is made, after everything that
can be checked without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.compose import composing, explain
from src.errors import InputError
from src.kv.budget import Budget, SplitBudget, parse_budget
from src.kv.checks import shown as as_typed

if TYPE_CHECKING:
    from src.engine.request import Variant

PARTS = ("allocate", "store", "read")  # folders of conf/policy, whose files go with any policy
LONGEST_NAME = 100  # characters of a policy's name: it is part of file names


@dataclass(frozen=True, eq=False)
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
    node = composed([f"policy={name}", f"seed={seed}"]).policy
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise InputError(f"policy={name}: its configuration has no _target_; valid: _target_: module.Class")
    unknown = sorted(set(options) - set(node) - set(PARTS))
    if unknown:
        meant = get_close_matches(str(unknown[0]), PARTS)  # every policy takes parts; who seems to want one is told
        valid = ", ".join([*sorted({*map(str, node)} - {"name", "_target_", *PARTS}), *(PARTS if meant else ())])
        raise InputError(f"policies: {name} has no option {unknown[0]!r}; valid: {valid or 'none'}")
    parts = {part: part_config(name, part, options.pop(part), node.get(part)) for part in PARTS if part in options}
    merged: Any = OmegaConf.merge(node, options)
    OmegaConf.set_struct(merged, False)
    for part, value in parts.items():
        merged[part] = value
    return merged


def part_config(policy: str, part: str, given: Any, own: Any) -> Any:
    """What a sweep gives for a part, as settings.

    Args:
        given: the name of a file in conf/policy/allocate (or store, read); `{name: ..., option: value}`; options for
            the part that the policy's own file brings; settings with a _target_; None: no part.
        own: that part, or None.

    Raises:
        InputError: anything else.
    """
    options = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else None
    if given is None or (options and "_target_" in options):
        return options
    chosen = options.pop("name", None) if options else None
    fits = isinstance(chosen, str) and re.fullmatch(r"[\w-]+(/[\w-]+)*", chosen)
    if options is None or (not fits if chosen is not None or own is None else False):
        raise InputError(
            f"policies: {policy}: {part}={given}: valid: the name of a file of conf/policy/{part}, "
            "{name: ..., option: value}, or null"
        )
    node = own if chosen is None else file_of(part, str(chosen))
    plain: Any = OmegaConf.to_container(node, resolve=True)
    return {**plain, **options}


def file_of(part: str, name: str) -> Any:
    """A part as its own file says it: the policy that conf/config.yaml names brings none to mix in."""
    return composed([f"policy/{part}={name}"]).policy[part]


def composed(overrides: Sequence[str]) -> DictConfig:
    """Raises InputError: it cannot be composed."""
    extra: list[str] = []
    if HydraConfig.initialized():  # a folder of the user's own policies
        sources = HydraConfig.get().runtime.config_sources
        extra = [f"{s.schema}://{s.path}" for s in sources if s.provider not in ("hydra", "main", "schema")]
    search = ["hydra.searchpath=[" + ",".join(map(quoted, extra)) + "]"] if extra else []
    try:
        with composing():
            return compose("config", overrides=[*overrides, *search])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(explain(error, "config", [])) from None


def chosen_parts(policy: Mapping[str, Any]) -> dict[str, Any]:
    """A command's policy; where it chose a file of conf/policy/allocate (store, read), with that file's settings alone.

    Hydra mixes in those of the part that the policy's own file brings; they are left out unless somebody changed one.
    """
    chosen, choices = dict(policy), HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    for part in PARTS:
        if (name := choices.get(f"policy/{part}")) and isinstance(policy.get(part), Mapping):
            mine = composed([f"policy={choices['policy']}"]).policy.get(part) or {}
            theirs = file_of(part, str(name))
            stale = {key for key in mine if key not in theirs}
            chosen[part] = {k: v for k, v in policy[part].items() if k not in stale or v != mine[k]}
    return chosen


def quoted(value: str) -> str:
    """For Hydra's override grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def make_cell(policy: Mapping[str, Any] | DictConfig, budget: Budget | None, shown: str = "") -> CellConfig:
    """The policy object and its label; `policy` has `name`, `_target_` and the options.

    Raises:
        InputError: a value that the policy does not take.
    """
    from src.config.targets import make_policy
    from src.engine.request import Variant

    plain: Any = OmegaConf.to_container(policy, resolve=True) if isinstance(policy, DictConfig) else policy
    settings: dict[str, Any] = dict(plain)
    name = settings.pop("name", str(settings.get("_target_") or chosen_policy()).rpartition(".")[2].lower())
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise InputError(f"policy.name={as_typed(name)}: valid: a name of 1 to {LONGEST_NAME} printable characters")
    made = make_policy(settings, name)
    name = with_parts(name, settings)
    settings = {"name": name, **settings}
    if isinstance(budget, SplitBudget) and made.uses_budget:
        settings["decode_budget"] = budget.decode
        shown = f"{shown or name} decode={budget.decode:g}"
    return CellConfig(name, settings, Variant(made, budget if made.uses_budget else None), shown or name)


def with_parts(name: str, settings: Mapping[str, Any]) -> str:
    """A policy's name with those of the parts that it was combined with: `snapkv+adakv`.

    A part that the policy's own file brings has no name there: it is in the policy's.
    """
    parts = [settings[part] for part in PARTS if isinstance(settings.get(part), Mapping)]
    names = [str(part["name"]) for part in parts if "name" in part]
    there = name.split("+")[1:]  # settings that were recorded have the whole name
    return "+".join([name, *(part for part in names if part not in there)])


def chosen_policy() -> str:
    """What `policy=` was given, for messages about a file that says no name."""
    return str(HydraConfig.get().runtime.choices.get("policy")) if HydraConfig.initialized() else "policy"


def grid(policies: Any, budgets: Any, seed: int = 0) -> list[CellConfig]:
    """All cells; a policy without a budget has one.

    Raises:
        InputError: an empty grid, a cell listed twice, an unknown policy or option, an unusable budget.
    """
    for name, values in (("policies", policies), ("budgets", budgets)):
        if not isinstance(values, list):
            raise InputError(
                f"{name}={values}: valid: a list, e.g. {name}=[{'h2o,snapkv' if name == 'policies' else '128,256'}]"
            )
    if not policies:
        raise InputError("policies=[]: the grid is empty; valid: at least one policy")
    parsed = [(given, parse_budget(given)) for given in budgets]
    cells: list[CellConfig] = []
    for spec, policy in [(spec, policy_config(spec, seed)) for spec in policies]:
        options = [] if isinstance(spec, str) else [f"{k}={v}" for k, v in spec.items() if k != "name"]
        shown = " ".join([str(policy.name), *options])
        single = not make_cell(policy, 1 << 30).variant.policy.uses_budget
        if not budgets and not single:
            raise InputError(f"budgets=[]: the grid is empty; valid: at least one budget for {shown}")
        for given, budget in [(None, None)] if single else parsed:
            cell = make_cell(policy, budget, shown)
            what = (cell.variant.policy, cell.variant.budget)
            if any(what == (other.variant.policy, other.variant.budget) for other in cells):
                raise InputError(f"policies, budgets: the cell {shown}, budget {given} is listed twice; valid: once")
            cells.append(cell)
    return cells
