"""`--help` out of the YAML files themselves, so that it can never fall behind them.

The text around it is `hydra.help` in conf/; it asks for these parts as `${choices:GROUP}` and `${settings:FILE}`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from string import Template

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from src.config.compose import CONF, composing


def register_help() -> None:
    OmegaConf.register_new_resolver("choices", choices, replace=True)
    OmegaConf.register_new_resolver("settings", settings, replace=True)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """`--help` with overrides and no other flag, which Hydra would have to look at."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    return bool(flags) and all(flag in ("--help", "-h") for flag in flags)


def help_text(config_name: str, arguments: Sequence[str]) -> str | None:
    """What Hydra's own --help prints; that one first lists every group twice, which takes a second.

    None: the text has placeholders that only Hydra can fill in.
    """
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    with composing():
        cfg = compose(config_name, overrides=overrides, return_hydra_config=True)
        text = Template(cfg.hydra.help.template)
        return None if text.get_identifiers() else text.substitute()


def choices(group: str) -> str:
    """The group's valid names, those of folders that the user added included."""
    hydra = GlobalHydra.instance().hydra
    names = hydra.config_loader.get_group_options(group) if hydra else []
    listed = ", ".join(name for name in names if not name.startswith("_")) or "none"
    return textwrap.fill(
        listed, 100, initial_indent=f"  {group:16}", subsequent_indent=" " * 18, break_on_hyphens=False
    )


def settings(file: str, over: str = "") -> str:
    """A YAML file's settings with their comments: no headline, no defaults list, nothing of Hydra's own.

    Args:
        over: a file whose settings take the place of this one's; they are left out here.
    """
    path = CONF / f"{file}.yaml"
    if not path.is_file():
        return "  (see the YAML file that you added)"
    lines: list[str] = []
    hidden = False
    taken: tuple[str, ...] = ("#", "defaults:", "hydra:", "name:", "_target_:")
    if over and (CONF / f"{over}.yaml").is_file():
        above = (CONF / f"{over}.yaml").read_text(encoding="utf-8").splitlines()
        taken += tuple(f"{line.partition(':')[0]}:" for line in above if line[:1] not in (" ", "#", ""))
    for line in path.read_text(encoding="utf-8").splitlines():
        if line[:1] not in (" ", ""):
            hidden = line.startswith(taken)
        if line and not hidden:
            lines.append("  " + line)
    return "\n".join(lines).replace("$", "$$") or "  (none)"  # Hydra's template would read a dollar as its own
