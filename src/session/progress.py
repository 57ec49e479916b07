"""Progress of a session on the terminal: ETA, and the scores so far, per cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from evals.visible import visible
from src.config.cells import CellConfig
from src.records.record import Record

QUIET_SECONDS = 20.0  # between two lines where there is no terminal to draw on


class Progress:
    """A bar over all (sample, cell) pairs and a table of running mean scores; plain lines without a terminal."""

    def __init__(self, cells: Sequence[CellConfig], total: int) -> None:
        self.cells, self.total = list(cells), total * len(cells)
        self.sums: dict[CellConfig, tuple[float, int, int]] = {cell: (0.0, 0, 0) for cell in cells}
        self.finished = 0
        self.console = Console(file=sys.stderr)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=3600,  # samples end in bursts, a wave at a time
        )
        self._task = self._bar.add_task("samples x cells", total=self.total)
        self._live: Live | None = None
        self._started = self._spoken = time.monotonic()
        self._skipped = 0

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(self._drawing(), console=self.console, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._drawing())
            self._live.__exit__(kind, error, trace)
        elif self.finished:
            self._speak()

    def skip(self, cell: CellConfig) -> None:
        """A pair that an earlier run had finished."""
        self._skipped += 1
        self._advance()

    def done(self, cell: CellConfig, record: Record) -> None:
        """A pair finished now."""
        total, n, failed = self.sums[cell]
        if record.error or record.score is None:
            self.sums[cell] = (total, n, failed + 1)
        else:
            self.sums[cell] = (total + record.score, n + 1, failed)
        self._advance()

    def _advance(self) -> None:
        self.finished += 1
        self._bar.advance(self._task)
        if self._live is not None:
            self._live.update(self._drawing())
        elif time.monotonic() - self._spoken > QUIET_SECONDS:
            self._speak()

    def _speak(self) -> None:
        """One plain line: how far, how long still, scores so far."""
        self._spoken = time.monotonic()
        ran = self.finished - self._skipped
        seconds = (self.total - self.finished) * (self._spoken - self._started) / max(ran, 1)
        if self.finished == self.total and not ran:
            left = "nothing was missing"
        else:
            left = f"about {seconds:.0f} s left" if ran >= len(self.cells) else "the first samples are under way"
        scores = "  ".join(f"{name(c)} {self._score(c)}" for c in self.cells if self.sums[c][1])
        print(f"{self.finished}/{self.total} done, {left}  {scores}", file=sys.stderr, flush=True)

    def _score(self, cell: CellConfig) -> str:
        total, n, failed = self.sums[cell]
        return (f"{total / n:.1f}" if n else "-") + (f" ({failed} failed)" if failed else "")

    def _drawing(self) -> Group:
        table = Table(title="mean score of the samples run now", title_justify="left")
        budgets = list(dict.fromkeys(c.budget for c in self.cells))
        table.add_column("policy")
        for budget in budgets:
            table.add_column("all" if budget is None else str(budget), justify="right")
        for label in dict.fromkeys(c.shown for c in self.cells):
            mine = {c.budget: c for c in self.cells if c.shown == label}
            table.add_row(Text(visible(label)), *(self._score(mine[b]) if b in mine else "" for b in budgets))
        return Group(table, self._bar)


def name(cell: CellConfig) -> str:
    return visible(cell.shown if cell.budget is None else f"{cell.shown}-{cell.budget}")
