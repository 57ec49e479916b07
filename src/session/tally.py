"""What a session has to say at its end, counted on the way and printed to stderr."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field

from src.records.record import Record


@dataclass
class Tally:
    """Counts of one session.

    Attributes:
        failed: samples.
        unfinished: predictions that end in the middle of a thought.
        without_positions: finished samples that run again, as what they had kept was not there.
        changed_answers: finished samples that run again, as their reference answers are others now.
        faults: of policies, by the line that says so.
    """

    retention: str
    failed: int = 0
    unfinished: int = 0
    without_positions: int = 0
    changed_answers: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, shown: str, record: Record) -> None:
        """A record of the cell that is called so."""
        self.failed += bool(record.error)
        self.unfinished += record.thought == "unfinished"
        if record.error and record.error.startswith("policy "):
            self.faults[f"{shown}: {record.error}"] += 1

    def say_what_ran_again(self) -> None:
        for reason, count in self.faults.items():  # a policy's fault is the same for many samples
            say(f"{reason}{f' (and {count - 1} more like it)' if count > 1 else ''}")
        if self.without_positions:
            say(
                f"{self.without_positions} finished samples ran again: what they had kept was not there "
                f"(retention={self.retention}; retention=off leaves them)"
            )
        if self.changed_answers:
            say(f"{self.changed_answers} finished samples ran again: their reference answers have changed")

    def say_what_failed(self) -> None:
        if self.failed:
            say(f"{self.failed} samples failed; their reasons are in predictions.jsonl (`error`)")
        if self.unfinished:
            say(f"{self.unfinished} predictions end in the middle of a thought; they score 0")


def say(line: str) -> None:
    print(line, file=sys.stderr)
