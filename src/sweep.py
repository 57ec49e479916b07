"""A grid of policies x budgets over one shared prefill:

    python -m src.sweep policies=[full,h2o,snapkv] budgets=[128,256] tasks=pocket

Every cell writes the very folder `src.run` would have written, so runs and sweeps finish each other's work.
See conf/sweep.yaml for every setting, or `python -m src.sweep --help`.
"""

from __future__ import annotations

import sys

from src.config.cells import grid
from src.config.main import main
from src.config.settings import SweepSettings
from src.logs import log_to_stderr


def sweep(cfg: SweepSettings) -> int:
    """The job: returns the exit code and prints the folder of all cells' results as the last line."""
    log_to_stderr()
    cells = grid(cfg.policies, cfg.budgets, cfg.seed)
    from src.session.session import Session, show_results  # torch, transformers: not before the settings are right

    session = Session(cfg, cells, lanes=cfg.max_lanes)
    code = session.run()
    show_results(session.cells)
    return code


if __name__ == "__main__":
    sys.exit(main("sweep", sweep))
