"""One policy, one budget:  python -m src.run policy=ahakv model=llama3-8b budget=512

See conf/config.yaml for every setting, or `python -m src.run --help`.
"""

from __future__ import annotations

import logging
import sys

from omegaconf import DictConfig

from src.checks import check_settings
from src.session import Session, show_results
from src.settings import main, make_cell, parse_budget


def run(cfg: DictConfig) -> int:
    """The job: returns the exit code and prints the results folder as the last line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    check_settings(cfg)
    cell = make_cell(cfg.policy, parse_budget(cfg.budget))
    session = Session(cfg, [cell], lanes=cfg.lanes)
    code = session.run()
    show_results(session.cells)
    return code


if __name__ == "__main__":
    sys.exit(main("config", run))
