"""python -m src.report DIR...: tables, figures, statistics and one web page over finished runs.

A DIR is a run's folder or any folder above some. Written to --out (default: `report` beside the runs):
report.html, report.json, tables/ (Markdown, CSV, LaTeX) and figures/ (PNG, PDF). The page's path is the
last line on stdout.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from evals.arguments import OneLineParser
from evals.visible import visible
from src.compare.intervals import RESAMPLES, check_resamples
from src.errors import InputError
from src.files import no_room
from src.logs import log_to_stderr
from src.tracking.wandb import MODES

WIDE = 150  # columns where the output is no terminal


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser("python -m src.report", InputError, "Tables, figures and a web page over finished runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's folder, or a folder above some")
    parser.add_argument("--baseline", help="policy to compare with at equal budget (default: snapkv if there)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: `report` beside the runs)")
    parser.add_argument("--wandb", default="disabled", choices=MODES, metavar="MODE", help=" | ".join(MODES))
    parser.add_argument("--wandb-project", default="kv-eviction-bench", metavar="NAME", help="(kv-eviction-bench)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"bootstrap resamples ({RESAMPLES})")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (0)")
    parser.add_argument("--samples", type=int, default=24, help="how many samples the page shows in full (24)")
    found = parser.parse_args(argv)
    check_resamples(found.resamples)
    if found.seed < 0:
        raise InputError(f"--seed {found.seed}: a whole number from 0 on")
    if found.samples < 0:
        raise InputError(f"--samples {found.samples}: a whole number from 0 on")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    log_to_stderr()
    try:
        given = _arguments(argv)
        from src.report.write import show, write_report  # torch, pandas, matplotlib: not for a wrong argument

        path, analysis, tables = write_report(
            given.folders, given.out, given.baseline, given.resamples, given.seed, given.samples
        )
        show(analysis, tables, Console() if sys.stdout.isatty() else Console(width=WIDE))
        if given.wandb != "disabled":
            from src.report.wandb import track_report

            track_report(given.wandb, given.wandb_project, path.parent, analysis, tables)
        print(f"report: {visible(str(path))}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (why := no_room(error)) is None:
            raise
        print(f"error: {why}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
