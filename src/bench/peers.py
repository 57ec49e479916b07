"""kvpress in a process of its own, and the grid against it cell by cell, in turn in one run (part `peers` of
`src.bench`)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.errors import InputError

WORKER = Path(__file__).with_name("kvpress_worker.py")
PRESSES = ("streaming_llm", "observed", "snapkv")  # the peer's own names for its methods


class Peer:
    """A worker process in another environment; the processes never compute at the same time.

    Args:
        interpreter: of the environment that has kvpress.
        model: folder with the weights.

    Attributes:
        version: kvpress', as it says itself.
    """

    def __init__(self, interpreter: str, model: str) -> None:
        remedy = "valid: a Python interpreter; `make bench-peers` builds that environment"
        try:
            self.process = subprocess.Popen(
                [interpreter, str(WORKER), model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except FileNotFoundError:
            raise InputError(f"peer_python={interpreter}: no such file; {remedy}") from None
        except (OSError, ValueError) as error:  # a folder, no right to run it, no program, no name at all
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"peer_python={interpreter}: cannot be run ({reason}); {remedy}") from None
        self.version = str(self._answer().get("version", ""))

    def cell(self, ids: list[int], press: str, budget: int | None, new_tokens: int) -> float:
        """Seconds of one cell."""
        return float(self._ask(ids=ids, press=press, budget=budget, new_tokens=new_tokens)["seconds"])

    def kept(self, ids: list[int], presses: Sequence[Mapping[str, Any]]) -> list[list[list[list[int]]]]:
        """Positions that presses keep of a prompt: press -> layer -> KV head -> ascending.

        Args:
            presses: each with `press` (a name), `settings` of it, `budget` (entries per head, on average).
        """
        found: list[list[list[list[int]]]] = self._ask(ids=ids, presses=list(presses))["kept"]
        return found

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the missing answer says so
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise InputError("peer_python: the kvpress process ended; its own message is above")
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            raise InputError(f"peer_python: not the kvpress process, it says {line.strip()[:60]!r}") from None

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def compare(
    peer: Peer,
    ours: Callable[[], float],
    ids: list[int],
    budgets: Sequence[int],
    new_tokens: int,
    turns: int,
) -> list[dict[str, Any]]:
    """Our grid and the peer's 1 + 4 x budgets cells, in turn.

    kvpress has no AhaKV; its cells are timed as SnapKV's, the nearest in cost. Its H2O (observed attention) needs
    eager attention, which is slow; the last column counts those cells at SnapKV's cost as well, in its favour.

    Args:
        ours: seconds per prompt of our grid.
    """
    rows = []
    for turn in range(turns):
        grid = ours()
        full = peer.cell(ids, "full", None, new_tokens)
        cells = {press: sum(peer.cell(ids, press, budget, new_tokens) for budget in budgets) for press in PRESSES}
        as_is = full + cells["streaming_llm"] + cells["observed"] + 2 * cells["snapkv"]
        kind = full + cells["streaming_llm"] + 3 * cells["snapkv"]
        row = {
            "part": "peers",
            "turn": turn + 1,
            "cells": 1 + 4 * len(budgets),
            "prompt_tokens": len(ids),
            "new_tokens": new_tokens,
            "ours_seconds_per_prompt": grid,
            "kvpress_seconds_per_prompt": as_is,
            "ratio": as_is / grid,
            "ratio_h2o_as_snapkv": kind / grid,
        }
        print(f"  turn {turn + 1}: ours {grid:.2f} s, kvpress {as_is:.2f} s", file=sys.stderr, flush=True)
        rows.append(row)
    return rows
