"""Slurm by `hydra-submitit-launcher`. Hydra imports this file at every start, so it imports little itself."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

POLL_SECONDS = 2.0
GRACE_SECONDS = 20.0  # a result may show on a shared file system a little after its job has left the queue

if find_spec("hydra_plugins.hydra_submitit_launcher"):
    from hydra.core.singleton import Singleton
    from hydra.core.utils import JobReturn
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    class ArrayLauncher(SlurmLauncher):
        """One job array; all its jobs are waited for and reported, also those that Slurm killed."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            from src.config.cluster import Outcome, finish, outcome_of

            jobs = self._submit(job_overrides, initial_job_idx)
            array = jobs[0].job_id.split("_")[0]
            print(f"Slurm job {array}: {len(jobs)} jobs, logs in {jobs[0].paths.folder}", file=sys.stderr, flush=True)
            try:
                lost = wait(array, jobs)
            except KeyboardInterrupt:
                print(f"the jobs go on in Slurm; `scancel {array}` stops them", file=sys.stderr)
                raise
            outcomes = []
            for job in jobs:
                kind, value = ("lost", None) if job.job_id in lost else job._get_outcome_and_result()
                if kind == "success":
                    outcomes.append(outcome_of(value))
                elif kind == "lost":
                    outcomes.append(Outcome(1, f"Slurm job {job.job_id} ended without a result; {log_of(job)}"))
                else:
                    last = (str(value).strip().splitlines() or ["unknown"])[-1]
                    outcomes.append(Outcome(1, f"Slurm job {job.job_id}: {last}; {log_of(job)}"))
            return finish(self.task_function, job_overrides, outcomes)

        def _submit(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
            """As in the base class."""
            import submitit

            from src.errors import InputError

            assert self.config is not None
            params = dict(self.params)
            folder, retries = params.pop("submitit_folder"), params.pop("max_num_timeout")
            common = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node"}
            common |= {"mem_gb", "nodes", "name", "stderr_to_stdout"}
            Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
            state = Singleton.get_state()
            columns = zip(
                *(
                    (list(overrides), "hydra.sweep.dir", first + i, f"job_id_for_{first + i}", state)
                    for i, overrides in enumerate(job_overrides)
                ),
                strict=True,
            )
            try:
                executor = submitit.AutoExecutor(cluster="slurm", folder=folder, slurm_max_num_timeout=retries)
                executor.update_parameters(**{k if k in common else f"slurm_{k}": v for k, v in params.items()})
                return list(executor.map_array(self, *columns))
            except Exception as error:  # no sbatch here, or it refuses the job: a partition, an account, a limit
                last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise InputError(
                    f"cluster=slurm: the jobs cannot be submitted ({last}); valid: a machine with sbatch, and "
                    "hydra.launcher.* as this cluster allows (conf/cluster/slurm.yaml)"
                ) from None


def wait(array: str, jobs: Sequence[Any]) -> set[str]:
    """Until each job has a result or is no longer in the queue; returns the ids of the latter.

    Asks squeue, which every Slurm has. submitit asks sacct, and where accounting is off it would wait for a
    killed job for ever.
    """
    gone: dict[str, float] = {}
    while True:
        pending = [job for job in jobs if not job.paths.result_pickle.exists()]
        now = time.monotonic()
        if all(now - gone.get(job.job_id, now) > GRACE_SECONDS for job in pending):
            return {job.job_id for job in pending}
        queued = in_queue(array)
        for job in pending:
            if queued is None or job.job_id in queued:
                gone.pop(job.job_id, None)
            else:
                gone.setdefault(job.job_id, now)
        time.sleep(POLL_SECONDS)


def in_queue(array: str) -> set[str] | None:
    """The array's jobs that wait or run; None if Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--jobs", array, "--format", "%i"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        return set(asked.stdout.split())
    return set() if "Invalid job id" in asked.stderr else None


def log_of(job: Any) -> str:
    path = job.paths.stderr
    return f"log: {path}" if path.exists() else f"it wrote no log in {path.parent}"
