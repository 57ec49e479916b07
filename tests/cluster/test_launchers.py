"""Jobs on real clusters: the same results as in one process, failures named, resumed without recomputing."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import JOBS, ROOT, Harness

ONE_CPU = {"slurm": "hydra.launcher.cpus_per_task=1", "ray": "hydra.launcher.ray.remote.num_cpus=1"}


@pytest.fixture(params=["slurm", "ray"])
def env(request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    """The cluster's name and the variables that lead to it."""
    if request.param == "slurm":
        return "slurm", request.getfixturevalue("slurm")
    request.getfixturevalue("ray_launcher")
    return "ray", {}


@pytest.mark.parametrize("entry", ["run", "sweep"])
def test_results_equal_the_local_ones(
    env: tuple[str, dict[str, str]], entry: str, harness: Harness, local: Callable[[str], str]
) -> None:
    """Also where two jobs fill one folder at once: the sweep's jobs have the same cells and different tasks."""
    name, variables = env
    root = f"{name}-{entry}"
    done = harness(entry, root, f"cluster={name}", ONE_CPU[name], *JOBS[entry], **variables)
    assert done.returncode == 0
    expected = harness.results(local(entry))
    assert len(expected) == 4 and harness.results(root) == expected
    assert harness.metrics(root) == harness.metrics(local(entry))
    paths = [line for line in done.stdout.splitlines() if line.startswith("results: ")]
    assert len(paths) == (4 if entry == "run" else 2)
    assert done.stdout.splitlines()[-1] == paths[-1]


def test_a_failed_job_is_named_and_a_second_launch_does_only_what_is_missing(
    env: tuple[str, dict[str, str]], harness: Harness
) -> None:
    """snapkv refuses a budget of 8 (its window is 32), lethal's worker is killed, h2o finishes."""
    name, variables = env
    root = f"{name}-failures"
    harness.trigger.touch()
    jobs = (f"cluster={name}", ONE_CPU[name], "budget=8", "tasks=needle")
    done = harness("run", root, *jobs, "policy=lethal,snapkv,h2o", **variables)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert errors[0].startswith("error: job policy=lethal: ")
    assert errors[1].startswith("error: job policy=snapkv: ") and "budget=8" in errors[1]
    assert "2 of 3 jobs failed" in done.stderr
    assert [folder.split("-")[0] for folder in harness.results(root)] == ["h2o"]

    harness.trigger.unlink()
    before = harness.stamps(root)
    done = harness("run", root, *jobs, "policy=lethal,h2o", **variables)
    assert done.returncode == 0
    after = harness.stamps(root)
    assert sorted(folder.split("-")[0] for folder in after) == ["h2o", "lethal"]
    assert before.items() <= after.items()  # h2o's predictions were not touched


def test_slurm_refuses_a_partition_in_one_line(slurm: dict[str, str], harness: Harness) -> None:
    done = harness("run", "none", "cluster=slurm", "hydra.launcher.partition=nowhere", "policy=h2o,snapkv", **slurm)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: cluster=slurm")]) == 1
    assert "partition" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_a_missing_launcher_names_its_extra(name: str) -> None:
    python = ROOT / ".venv" / "bin" / "python"
    package = {"slurm": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}[name]
    if not python.exists() or str(python) == sys.executable:
        pytest.skip("needs make setup's environment beside this one")
    probe = f"import hydra_plugins.{package}"
    if subprocess.run([python, "-c", probe], cwd=ROOT, capture_output=True, check=False).returncode == 0:
        pytest.skip(f"{package} is installed in {python}")
    command = [python, "-m", "src.run", f"cluster={name}", "policy=h2o"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and f"pip install '.[{name}]'" in done.stderr
