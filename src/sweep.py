"""A grid of policies x budgets over one shared prefill:

    python -m src.sweep policies=[full,h2o,snapkv] budgets=[128,256] tasks=pocket

Every cell writes the very folder `src.run` would have written, so runs and sweeps finish each other's work.
See conf/sweep.yaml for every setting, or `python -m src.sweep --help`.
"""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config.cells import grid
from src.config.main import main
from src.config.rules import check_settings
from src.logs import log_to_stderr


def sweep(cfg: DictConfig) -> int:
    """The job: returns the exit code and prints the folder of all cells' results as the last line."""
    log_to_stderr()
    check_settings(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    cells = grid(plain["policies"], plain["budgets"], cfg.seed)
    from src.session.session import Session, show_results  # torch, transformers: not before the settings are right

    session = Session(cfg, cells, lanes=cfg.max_lanes)
    code = session.run()
    show_results(session.cells)
    return code


if __name__ == "__main__":
    sys.exit(main("sweep", sweep))
