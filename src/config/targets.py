"""From a policy's settings to its object. Nothing but a class of a `Policy`, or of a `Part` of one, is
ever called, at any depth.

`hydra.utils.instantiate` would call whatever a `_target_` names (`torch.load`, `builtins.open`, ...); here the name is
resolved, the class checked, and only then called. Importing a module runs it all the same: somebody else's folder of
configurations is code.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf

from policies.base import Policy
from policies.parts import Part
from src.errors import InputError
from src.kv.faults import RAISED, said
from src.kv.sequel import Sequel

TARGET = "_target_"
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
SPECIAL = re.compile(r"_\w+_")  # Hydra's own words in a config


def make_policy(settings: Mapping[str, Any], name: str) -> Policy:
    """The policy that `_target_` and options describe; an option may be such a description itself.

    Args:
        settings: plain, without the policy's name.
        name: what messages call it.

    Raises:
        InputError: a target that is no policy's class, or options that it does not take.
    """
    made: Policy = make(settings, name, (Policy,))
    return made


def make(settings: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
    """As `make_policy`, of a class of one of these kinds."""
    options = {key: option(value, f"{name}: {key}") for key, value in settings.items() if key != TARGET}
    for key in options:
        if not isinstance(key, str) or SPECIAL.fullmatch(key):
            raise InputError(f"policy={name}: {key}: no option of a policy; valid: {TARGET} and the class's options")
    found = class_of(settings.get(TARGET), name, kinds)
    if issubclass(found, Part):
        options.pop("name", None)  # what tables call it
        valid = [setting.name for setting in fields(found) if setting.init] if is_dataclass(found) else list(options)
        if unknown := [key for key in options if key not in valid]:
            raise InputError(f"policy={name}: {found.__name__} has no option {unknown[0]!r}; valid: {', '.join(valid)}")
    try:
        made = found(**options)
        if isinstance(made, Policy):
            check_declared(made)
        hash(made)  # cells are told apart by their policies
    except RAISED as error:
        message = said(error) or f"its constructor raised {type(error).__name__}"
        raise InputError(f"policy={name}: {message}") from None
    return made


def option(value: Any, name: str) -> Any:
    """An option's value as a constructor takes it: numbers, texts, lists and mappings of them, a policy or a part."""
    if isinstance(value, Mapping) and TARGET in value:
        return make(value, name, (Policy, Part))
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str) or SPECIAL.fullmatch(key):
                raise InputError(f"policy={name}.{key}: valid: texts as names, none between underscores")
            if isinstance(option(inner, f"{name}.{key}"), Policy | Part):
                raise InputError(f"policy={name}.{key}: a policy within a mapping; valid: as an option of its own")
        return OmegaConf.create(dict(value))
    if isinstance(value, list):
        for i, inner in enumerate(value):
            if isinstance(option(inner, f"{name}[{i}]"), Policy | Part):
                raise InputError(f"policy={name}[{i}]: a policy within a list; valid: as an option of its own")
        return OmegaConf.create(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"policy={name}={value}: valid: a finite number")
    if value is not None and not isinstance(value, bool | int | float | str):
        raise InputError(
            f"policy={name}={value!r}: valid: numbers, texts, true, false, null, lists and mappings of them"
        )
    return value


def class_of(target: Any, name: str, kinds: tuple[type, ...]) -> type[Any]:
    """The class that a dotted name stands for.

    Raises:
        InputError: it cannot be imported, or is of none of these kinds.
    """
    kind = " or ".join(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
    wanted = f"valid: {TARGET}: module.Class, a {kind}"
    if target is None:
        raise InputError(f"policy={name}: its configuration has no {TARGET}; {wanted}")
    if not isinstance(target, str) or not DOTTED.fullmatch(target):
        raise InputError(f"policy={name}: {TARGET}={target}: {wanted}")
    found = locate(target, name)
    if not inspect.isclass(found) or not issubclass(found, kinds):
        raise InputError(f"policy={name}: {target} is not a {kind}; {wanted}")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise InputError(f"policy={name}: {target} does not define {', '.join(missing)}")
    return found


def locate(target: str, name: str) -> Any:
    """What a dotted name stands for; its module is imported."""
    module, *inner = target.rpartition(".")[0], target.rpartition(".")[2]
    while True:
        try:
            found: Any = importlib.import_module(module)
            break
        except RAISED as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == module
            if absent and "." in module:  # perhaps a class within a class
                module, _, last = module.rpartition(".")
                inner.insert(0, last)
                continue
            reason = f"{type(error).__name__}: {said(error)}".removesuffix(": ")
            raise InputError(
                f"policy={name}: {TARGET}={target} cannot be imported ({reason}); "
                "valid: a module on PYTHONPATH and a class in it"
            ) from None
    for part in inner:
        if part not in vars(found):  # what a module merely reaches through an attribute's code is not asked for
            raise InputError(f"policy={name}: {TARGET}={target}: {module} has no {'.'.join(inner)}")
        found = vars(found)[part]
        if not inspect.isclass(found):
            break
    return found


def check_declared(policy: Policy) -> None:
    """What a policy says about itself before anything runs.

    Raises:
        ValueError: it names what is wrong and what would be valid.
    """
    for name in ("evicts_while_decoding", "uses_budget", "uses_decode_budget", "own_pool", "may_refuse"):
        if not isinstance(getattr(policy, name), bool):
            raise ValueError(f"{name}={getattr(policy, name)!r} in its class; valid: True, False")
    for name in ("least_budget", "least_decode"):
        least = getattr(policy, name)()
        if type(least) is not int or least < 0:
            raise ValueError(f"{name}() gives {least!r}; valid: a whole number, 0 or more")
    if not isinstance(policy.sequel, Sequel | None):
        raise ValueError(f"sequel={policy.sequel!r} in its class; valid: None, a src.kv.sequel.Sequel")
    hash(policy.sequel)  # equal ones are read once
