"""What the cluster tests share: a tiny model on disk, a way to call the entry points, a Slurm cluster.

They start real clusters and are not part of `make test`: `make test-cluster`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from slurm_cluster import Unavailable, cluster  # noqa: E402

from tests.support.tiny import tiny, tiny_tokenizer  # noqa: E402

TIMES = ("seconds", "prefill_seconds", "decode_seconds", "lanes", "check")  # what may differ from launch to launch


class Harness:
    """Calls the entry points on the tiny model, as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "tiny"
        tiny("llama").save_pretrained(self.model)
        tiny_tokenizer().save_pretrained(self.model)
        self.trigger = folder / "lethal"  # while it exists, jobs of the policy `lethal` die
        policies = folder / "conf" / "policy"
        policies.mkdir(parents=True)
        (policies / "lethal.yaml").write_text("name: lethal\n_target_: lethal.Lethal\nheavy_share: 0.5\n")
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{HERE}",
            "LETHAL": str(self.trigger),
            "HF_HUB_OFFLINE": "1",
        }

    def __call__(self, entry: str, root: str, *overrides: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"src.{entry}", "-m", *overrides, "model=local", f"model.path={self.model}"]
        command += ["model.max_prompt_tokens=200", "max_new_tokens=6", "wandb.mode=disabled", "limit=1"]
        command += [f"output_root={self.folder / root}", f"hydra.searchpath=[file://{self.folder / 'conf'}]"]
        done = subprocess.run(
            command,
            env={**self.env, **env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            preexec_fn=lambda: os.nice(10),
        )
        print(" ".join(command), done.stdout, done.stderr, f"exit code {done.returncode}", sep="\n")
        return done

    def results(self, root: str) -> dict[str, list[dict[str, Any]]]:
        """Run folder -> its predictions, without times."""
        found = {}
        for path in sorted((self.folder / root).glob("tiny/*/predictions.jsonl")):
            records = [json.loads(line) for line in path.read_text().splitlines()]
            records = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
            found[path.parent.name] = sorted(records, key=lambda r: (r["task"], r["id"]))
        return found

    def metrics(self, root: str) -> dict[str, Any]:
        """Run folder -> what of metrics.json does not depend on time and memory."""
        found = {}
        for path in sorted((self.folder / root).glob("tiny/*/metrics.json")):
            figures = json.loads(path.read_text())
            found[path.parent.name] = {k: figures[k] for k in ("average", "tasks", "retention", "comparability")}
        return found

    def stamps(self, root: str) -> dict[str, int]:
        """Run folder -> when its predictions were last written."""
        return {p.parent.name: p.stat().st_mtime_ns for p in (self.folder / root).glob("tiny/*/predictions.jsonl")}


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables that lead to a running one-node Slurm cluster."""
    if not find_spec("hydra_plugins.hydra_submitit_launcher"):
        pytest.skip("needs pip install '.[slurm]'")
    try:
        with cluster(tmp_path_factory.mktemp("slurm")) as env:
            yield env
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ray_launcher() -> None:
    if not find_spec("hydra_plugins.hydra_ray_launcher"):
        pytest.skip("needs pip install '.[ray]'")


@pytest.fixture(scope="session")
def local(harness: Harness) -> Callable[[str], str]:
    """`local("run")`: the same jobs as the clusters', in one process; gives the name of their root."""
    made: set[str] = set()

    def once(entry: str) -> str:
        root = f"local-{entry}"
        if root not in made:
            assert harness(entry, root, *JOBS[entry]).returncode == 0
            made.add(root)
        return root

    return once


JOBS = {
    "run": ("policy=snapkv,h2o", "budget=40,64", "tasks=needle"),
    "sweep": ("policies=[snapkv,h2o]", "budgets=[40,64]", "tasks=needle,kv_lookup"),
}
