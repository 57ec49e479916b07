"""`--help` out of the YAML files themselves, so that it can never fall behind them.

The text around it is `hydra.help` in conf/; it asks for these parts as `${choices:GROUP}` and `${settings:FILE}`.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"


def register_help() -> None:
    OmegaConf.register_new_resolver("choices", choices, replace=True)
    OmegaConf.register_new_resolver("settings", settings, replace=True)


def choices(group: str) -> str:
    """The group's valid names, those of folders that the user added included."""
    hydra = GlobalHydra.instance().hydra
    names = hydra.config_loader.get_group_options(group) if hydra else []
    listed = ", ".join(name for name in names if not name.startswith("_")) or "none"
    return textwrap.fill(
        listed, 100, initial_indent=f"  {group:11}", subsequent_indent=" " * 13, break_on_hyphens=False
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
