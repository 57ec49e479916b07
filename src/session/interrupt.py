"""Ctrl-C: the first finishes what is under way, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Remembers whether the user has asked to stop. Use `heeded()` around the work.

    Attributes:
        asked: true after the first Ctrl-C.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Ctrl-C comes here meanwhile. Only a process's main thread can ask for that.

        Raises:
            KeyboardInterrupt: at the second Ctrl-C.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._heed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after the samples in flight (Ctrl-C again: at once)", file=sys.stderr)
