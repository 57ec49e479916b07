"""What Hydra would take from a command line or a configuration without a word, or run: looked at first."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from yaml.reader import ReaderError

from src.errors import InputError

# Folders of conf/ that a command chooses from.
GROUPS = "policy|policy/allocate|policy/store|policy/read|model|tasks|experiment|cluster"
BASIC = "hydra._internal.core_plugins."
LAUNCHERS = (
    f"{BASIC}basic_launcher.BasicLauncher",
    "hydra_plugins.kv_eviction_cluster.slurm.ArrayLauncher",
    "hydra_plugins.kv_eviction_cluster.ray.TaskLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
)
SWEEPERS = (f"{BASIC}basic_sweeper.BasicSweeper",)
LOGGING = re.compile(r"logging(\.handlers)?\.\w+|colorlog\.ColoredFormatter")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_arguments(arguments: Sequence[str], config_name: str) -> None:
    """Flags, and overrides that no message of Hydra's makes plain.

    Raises:
        InputError: the first that is wrong.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}; valid flags: --hydra-help")

    parser.error = refuse  # type: ignore[method-assign]
    try:
        flags = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; valid flags: --hydra-help") from None
    if flags.config_dir and not any(Path(flags.config_dir).rglob("*.yaml")):
        problem = "holds no *.yaml" if Path(flags.config_dir).is_dir() else "no such folder"
        raise InputError(
            f"--config-dir={flags.config_dir}: {problem}; valid: a folder with policy/*.yaml (model/, ...)"
        )
    if flags.config_path or flags.config_name not in (None, config_name):
        flag = "path" if flags.config_path else "name"
        raise InputError(
            f"--config-{flag}={getattr(flags, f'config_{flag}')}: this command reads conf/{config_name}.yaml; "
            "valid: no such flag, and --config-dir=FOLDER for configurations of your own"
        )
    for override in flags.overrides:
        name, given, value = override.partition("=")
        if not name:
            raise InputError(f"{override}: no name before the equals sign; valid: name=value")
        if name.startswith("~"):
            name = name[1:]
            raise InputError(f"{override}: no setting can be taken away; valid: {name}=VALUE, or leave {name} out")
        if given and re.fullmatch(GROUPS, name) and value.lstrip().startswith(("[", "{")):
            several = (
                f"; for several: python -m src.sweep policies={value}" if name == "policy" and value[0] == "[" else ""
            )
            raise InputError(f"{override}: valid: one name{several}")


def unreadable(error: Exception, arguments: Sequence[str], conf: Path) -> str:
    """A configuration file that is no YAML, or no text: which one, and where."""
    if isinstance(error, OSError) and not error.filename:  # OmegaConf's word for a file that holds a number
        given = " ".join(a for a in arguments if re.match(rf"({GROUPS})=", a)) or "the configuration"
        return f"{given}: {' '.join(str(error).split())}; valid: a YAML file with name: value in every line"
    if isinstance(error, OSError):
        return f"{error.filename}: cannot be read ({error.strerror}); valid: a YAML file"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return (
            f"{mark.name}, line {mark.line + 1}: no YAML that can be used here ({error.problem}); valid: plain values"
        )
    folders = [conf, *(Path(a.partition("=")[2]) for a in arguments if a.startswith("--config-dir="))]
    folders += [Path(b) for a, b in itertools.pairwise(arguments) if a in ("--config-dir", "-cd")]
    if HydraConfig.initialized():
        folders += [Path(s.path) for s in HydraConfig.get().runtime.config_sources if s.schema == "file"]
    for path in sorted(path for folder in folders for path in folder.rglob("*.yaml") if path.is_file()):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return f"{path}: not UTF-8; valid: a YAML file in UTF-8"
    where = error.name if isinstance(error, ReaderError) else "a configuration file"
    return f"{where}: {' '.join(str(error).split())}; valid: a YAML file in UTF-8"


@contextmanager
def only_known_targets() -> Iterator[None]:
    """Meanwhile, a configuration that would have Hydra call something foreign is refused as soon as it is composed."""
    load = ConfigLoaderImpl.load_configuration

    def checked(self: ConfigLoaderImpl, *arguments: Any, **more: Any) -> DictConfig:
        cfg = load(self, *arguments, **more)
        check_hydra(cfg)
        return cfg

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]


def check_hydra(cfg: DictConfig) -> None:
    """Launchers, sweepers, callbacks and log handlers are called by name: only those that belong here are.

    Raises:
        InputError: any other.
    """
    node = cfg.get("hydra")
    if node is None:
        return
    # Values that refer to others are resolved: a name may be hidden behind one.
    parts = ("launcher", "sweeper", "callbacks", "job_logging", "hydra_logging", "searchpath")
    hydra = {name: plain(node, name) for name in parts}
    if hydra["callbacks"]:
        raise InputError(f"hydra.callbacks={hydra['callbacks']}: callbacks are not run here; valid: {{}}")
    for name, known in (("launcher", LAUNCHERS), ("sweeper", SWEEPERS)):
        part = hydra[name] if isinstance(hydra[name], dict) else {}
        target = part.get("_target_")
        if target not in known:
            raise InputError(f"hydra.{name}._target_={target}: valid: {', '.join(known)}")
        refuse_calls({k: v for k, v in part.items() if k != "_target_"}, f"hydra.{name}")
    for name in ("job_logging", "hydra_logging"):
        check_logging(hydra[name], f"hydra.{name}")
    for entry in hydra["searchpath"] or []:
        path = str(entry).removeprefix("file://")
        if "://" not in path and not Path(path).is_dir():
            raise InputError(f"hydra.searchpath={entry}: no such folder; valid: file:///a/folder")


def plain(node: DictConfig, name: str) -> Any:
    """A part as plain values; what refers to something that is known only later stays a text."""
    part = OmegaConf.select(node, name, throw_on_resolution_failure=False)
    if not OmegaConf.is_config(part):
        return part
    try:
        return OmegaConf.to_container(part, resolve=True)
    except Exception:
        return OmegaConf.to_container(part, resolve=False)


def refuse_calls(value: Any, where: str) -> None:
    """Raise for Hydra's own words (`_target_`, `_args_`, ...) anywhere below."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if re.fullmatch(r"_\w+_", str(key)):
                raise InputError(f"{where}.{key}={inner}: nothing is called from here; valid: plain values")
            refuse_calls(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            refuse_calls(inner, f"{where}[{i}]")


def check_logging(value: Any, where: str) -> None:
    """Raise for a factory, a class outside `logging`, or a reference to anything but the two streams."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            named = key in ("()", "class", "factory")
            if named and not LOGGING.fullmatch(str(inner)):
                raise InputError(f"{where}.{key}={inner}: valid: classes of Python's logging")
            check_logging(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_logging(inner, f"{where}[{i}]")
    elif isinstance(value, str) and value.startswith("ext://") and value not in STREAMS:
        raise InputError(f"{where}={value}: valid: {', '.join(STREAMS)}")
