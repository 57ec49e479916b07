"""Warnings on stderr, with nothing in them that a terminal would obey."""

from __future__ import annotations

import logging
import sys

from evals.visible import visible


class VisibleFormatter(logging.Formatter):
    """Names in a message may come from foreign folders: control characters are shown, lines stay lines."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n\t")


def log_to_stderr() -> None:
    """For entry points: warnings and worse, unless the process has handlers already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
