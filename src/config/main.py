"""Configuration: compose it, turn Hydra's complaints into one line, make policies and cells out of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from evals.errors import DataError
from evals.visible import one_line
from src.config.cluster import Outcome, distributed, report, run_job
from src.config.command_line import check_arguments, only_known_targets
from src.config.compose import CONF, explain, register_tasks
from src.config.help import asks_for_help, help_text, register_help
from src.config.settings import read_settings
from src.errors import InputError
from src.files import no_room

INTERRUPTED = 130  # the exit code of whatever Ctrl-C has ended


def main(config_name: str, job: Callable[[Any], int]) -> int:
    """Run `job` under Hydra, once or for `-m` many times, and turn what goes wrong into one line on stderr.

    Args:
        config_name: a file of conf/.
        job: takes what `src.config.settings.STAGES` has under that name; gives an exit code.

    Returns:
        The exit code, the largest of all jobs': 0, 1 (samples failed), 2 (a setting or an input is wrong).
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions
    register_tasks()
    register_help()
    codes: list[int] = []
    begun: list[DictConfig] = []

    def with_settings(cfg: DictConfig) -> int:
        return job(read_settings(config_name, cfg))

    def collect(cfg: DictConfig) -> int | Outcome:
        begun.append(cfg)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            outcome = run_job(with_settings, cfg)
            if distributed():
                return outcome  # to the launcher, in the process that the user started
            codes.append(report([HydraConfig.get().job.override_dirname.replace(",", " ")], outcome))
        else:
            try:
                codes.append(with_settings(cfg))
            except (InputError, DataError) as error:
                codes.append(complain(str(error)))
            except OmegaConfBaseException as error:
                codes.append(complain(explain(error, config_name, sys.argv[1:])))
            except OSError as error:
                if (why := no_room(error)) is None:
                    raise
                codes.append(complain(why))
        if codes[-1] == INTERRUPTED:
            raise KeyboardInterrupt  # ends the jobs that were to follow, too
        return codes[-1]

    collect.__module__, collect.__qualname__ = job.__module__, job.__qualname__
    collect.codes = codes  # type: ignore[attr-defined]  # where a launcher of hydra_plugins/ adds its jobs' codes
    try:
        check_arguments(sys.argv[1:], config_name)
        with only_known_targets():
            if asks_for_help(sys.argv[1:]) and (text := help_text(config_name, sys.argv[1:])):
                print(text)
                return 0
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(collect)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        return complain(explain(error, config_name, sys.argv[1:]))
    except InputError as error:  # of a launch
        return complain(str(error))
    except (ValueError, OSError, RecursionError) as error:
        if begun:
            raise  # a programming error; before any job it is an override or a file that Hydra cannot take
        return complain(explain(error, config_name, sys.argv[1:]))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # Hydra ends so after --help
        return int(end.code or 0)
    return max(codes, default=0)


def complain(message: str) -> int:
    """One line on stderr; returns the exit code for it."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2
