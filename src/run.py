"""One policy, one budget:  python -m src.run policy=ahakv model=llama3-8b budget=512

See conf/config.yaml for every setting, or `python -m src.run --help`.
"""

from __future__ import annotations

import sys

from src.config.cells import chosen_parts, make_cell
from src.config.main import main
from src.config.settings import RunSettings
from src.errors import InputError
from src.kv.budget import SplitBudget
from src.logs import log_to_stderr


def run(cfg: RunSettings) -> int:
    """The job: returns the exit code and prints the results folder as the last line."""
    log_to_stderr()
    cell = make_cell(chosen_parts(cfg.policy), cfg.budget)
    if isinstance(cfg.budget, SplitBudget) and not cell.variant.policy.uses_decode_budget:
        raise InputError(f"budget={cfg.budget}: {cell.label} has no decode phase of its own; valid: one number")
    from src.session.session import Session, show_results  # torch, transformers: not before the settings are right

    session = Session(cfg, [cell], lanes=cfg.lanes)
    code = session.run()
    show_results(session.cells)
    return code


if __name__ == "__main__":
    sys.exit(main("config", run))
