"""Speed and memory, side by side in one process:  python -m src.bench

Parts (`parts=[prefill,decode,grid,bytes,peak]`, see conf/bench.yaml):
    prefill  each policy's prefill against the plain model's, interleaved, as ratios
    decode   tokens/s of one lane, and of plain transformers, against the length of the prompt; on CUDA peak memory
    grid     all cells from one shared prefill against the same cells one by one
    bytes    cache bytes against the formula
    peak     the peak memory of a sweep without the full cache, at growing budgets
    peers    the grid against kvpress cell by cell (`make bench-peers` builds its environment and runs this)
    overlap  positions kept here and by kvpress, as shares (likewise)
Machines are noisy: what is compared runs in turn, and medians over the turns are reported with their number.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.visible import visible
from src.config.cells import grid
from src.config.main import main
from src.config.settings import BenchSettings
from src.logs import log_to_stderr


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """One table per part on stdout."""
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        columns = list(dict.fromkeys(key for row in mine for key in row if key != "part"))
        table = Table(title=part, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == "what" else "right")
        for row in mine:
            table.add_row(*(Text(shown(row.get(column))) for column in columns))
        Console(width=160).print(table)


def shown(value: Any) -> str:
    return "" if value is None else f"{value:,.3f}" if isinstance(value, float) else visible(str(value))


def bench(cfg: BenchSettings) -> int:
    log_to_stderr()
    cells = grid(cfg.policies, cfg.budgets)
    from src.bench.parts import Bench, Row  # torch, transformers: not before the settings are right
    from src.records.environment import environment

    work = Bench(cfg, cells)
    rows: list[Row] = []
    for part in cfg.parts:
        print(part, file=sys.stderr)
        rows += getattr(work, part)()
    show(rows)
    path = Path(cfg.output_root) / "bench" / f"{work.loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": "python -m src.bench " + " ".join(sys.argv[1:]),
        "environment": environment(str(work.model.device)),
        "random_weights": work.loaded.random_weights,
        "rows": rows,
    }
    path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"results: {visible(str(path))}")
    return 0


if __name__ == "__main__":
    sys.exit(main("bench", bench))
