"""A grid of policies x budgets over one shared prefill:

    python -m src.sweep policies=[full,h2o,snapkv] budgets=[128,256] tasks=pocket

Every cell writes the very folder `src.run` would have written, so runs and sweeps finish each other's work.
See conf/sweep.yaml for every setting, or `python -m src.sweep --help`.
"""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.checks import check_settings
from src.errors import InputError
from src.logs import log_to_stderr
from src.session import Session, show_results
from src.settings import CellConfig, main, make_cell, parse_budget, policy_config


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
    cells: list[CellConfig] = []
    for spec in policies:
        policy = policy_config(spec, seed)
        options = [] if isinstance(spec, str) else [f"{k}={v}" for k, v in spec.items() if k != "name"]
        shown = " ".join([str(policy.name), *options])
        single = not make_cell(policy, 1 << 30).variant.policy.uses_budget
        if not budgets and not single:
            raise InputError(f"budgets=[]: the grid is empty; valid: at least one budget for {shown}")
        for budget in [None] if single else budgets:
            cell = make_cell(policy, None if single else parse_budget(budget), shown)
            if any(cell.variant == other.variant for other in cells):
                raise InputError(f"policies, budgets: the cell {shown}, budget {budget} is listed twice; valid: once")
            cells.append(cell)
    return cells


def sweep(cfg: DictConfig) -> int:
    """The job: returns the exit code and prints the folder of all cells' results as the last line."""
    log_to_stderr()
    check_settings(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    cells = grid(plain["policies"], plain["budgets"], cfg.seed)
    session = Session(cfg, cells, lanes=cfg.max_lanes)
    code = session.run()
    show_results(session.cells)
    return code


if __name__ == "__main__":
    sys.exit(main("sweep", sweep))
