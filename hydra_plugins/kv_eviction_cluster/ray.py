"""Ray by `hydra-ray-launcher`. Hydra imports this file at every start, so it imports little itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if find_spec("hydra_plugins.hydra_ray_launcher"):
    from hydra.core.singleton import Singleton
    from hydra.core.utils import JobReturn, setup_globals
    from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher
    from omegaconf import open_dict

    class TaskLauncher(RayLauncher):
        """One Ray task per job; all are waited for and reported, also those whose worker died."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            import ray
            from hydra_plugins.hydra_ray_launcher._launcher_util import launch_job_on_ray, start_ray

            from src.config.cluster import Outcome, finish, outcome_of
            from src.errors import InputError

            setup_globals()
            assert self.config is not None and self.hydra_context is not None and self.task_function is not None
            Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
            try:
                start_ray(self.ray_cfg.init)
            except (ConnectionError, ValueError, TypeError, RuntimeError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise InputError(
                    f"cluster=ray: Ray does not start ({first}); valid: hydra.launcher.ray.init.* as ray.init() "
                    "takes them (conf/cluster/ray.yaml)"
                ) from None
            running = []
            for i, overrides in enumerate(job_overrides, initial_job_idx):
                config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
                with open_dict(config):
                    config.hydra.job.id, config.hydra.job.num = f"job_id_for_{i}", i
                running.append(
                    launch_job_on_ray(
                        self.hydra_context, self.ray_cfg.remote, config, self.task_function, Singleton.get_state()
                    )
                )
            print(f"Ray: {len(running)} jobs", file=sys.stderr, flush=True)
            outcomes = []
            for task in running:
                try:
                    outcomes.append(outcome_of(ray.get(task)))
                except ray.exceptions.RayError as error:  # its worker died: out of memory, killed, node lost
                    first = (str(error).strip().splitlines() or [""])[0]
                    outcomes.append(Outcome(1, f"{type(error).__name__}: {first}"))
            return finish(self.task_function, job_overrides, outcomes)
