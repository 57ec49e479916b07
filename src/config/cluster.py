"""Jobs of a multirun (`-m`): how each ended, wherever it ran. The launchers are in hydra_plugins/."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.types import RunMode
from omegaconf import DictConfig

from evals.errors import DataError
from evals.visible import one_line
from src.errors import InputError
from src.files import no_room

EXTRAS = {"hydra/launcher/submitit_slurm": "slurm", "hydra/launcher/ray": "ray"}  # which extra brings which launcher


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code, why in one line (if not 0), and what it printed where nobody sees it."""

    code: int
    message: str = ""
    output: str = ""


def distributed() -> bool:
    """Is this a job (or the launch) of a multirun whose jobs run in other processes, several at a time?"""
    if not HydraConfig.initialized():
        return False
    hydra = HydraConfig.get()
    return hydra.mode == RunMode.MULTIRUN and ".basic_launcher." not in hydra.launcher._target_


def run_job(job: Callable[[DictConfig], int], cfg: DictConfig) -> Outcome:
    """One job of several: whatever goes wrong in it is an outcome, so that the others run.

    Raises:
        KeyboardInterrupt: the user stopped this job, so the next must not start.
    """
    remote = distributed()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed) if remote else contextlib.nullcontext():
            code = job(cfg)
    except (InputError, DataError) as error:
        return Outcome(2, str(error))
    except OSError as error:
        if (why := no_room(error)) is None:
            traceback.print_exc()
        return Outcome(2 if why else 1, why or f"{type(error).__name__}: {error}")
    except Exception as error:
        traceback.print_exc()
        return Outcome(1, f"{type(error).__name__}: {error}")
    if code == 130 and not remote:
        raise KeyboardInterrupt
    why = {0: "", 130: "interrupted"}.get(code, "some samples failed")
    return Outcome(code, why, printed.getvalue())


def report(overrides: Sequence[str], outcome: Outcome) -> int:
    """Tell the user about one job; returns its exit code."""
    sys.stdout.write(outcome.output)
    sys.stdout.flush()
    if outcome.code:
        line = f"job {' '.join(overrides)}: {outcome.message}"
        print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
    return outcome.code


def outcome_of(returned: JobReturn | None) -> Outcome:
    """What a launcher got back from a job's process."""
    value = returned._return_value if returned else None
    if isinstance(value, Outcome):
        return value
    return Outcome(1, f"{type(value).__name__}: {value}")


def finish(task_function: Any, job_overrides: Sequence[Sequence[str]], outcomes: Sequence[Outcome]) -> list[JobReturn]:
    """The end of a launch: every job reported, in order, and its exit code handed to `src.config.main.main`."""
    returns = []
    for overrides, outcome in zip(job_overrides, outcomes, strict=True):
        task_function.codes.append(report(swept(overrides, job_overrides), outcome))
        done = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
        done.return_value = outcome
        returns.append(done)
    failed = sum(outcome.code != 0 for outcome in outcomes)
    if failed:
        print(
            f"{failed} of {len(outcomes)} jobs failed; the same command runs only what is missing",
            file=sys.stderr,
            flush=True,
        )
    return returns


def swept(overrides: Sequence[str], all_overrides: Sequence[Sequence[str]]) -> list[str]:
    """What tells this job from the others (all of its overrides if it is the only one)."""
    own = [o for o in overrides if any(o not in other for other in all_overrides)]
    return list(filter_overrides(own or list(overrides)))
