"""A one-node Slurm cluster on loopback, with its own key, ports and folder, for as long as a test session lasts.

Daemons run as the present user; nothing of a Slurm that this machine may already have is touched.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """No Slurm can run here; the message says why."""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A running cluster; gives the environment variables that lead to it.

    Raises:
        Unavailable: the packages are missing and cannot be installed, or the daemons do not start.
    """
    install()
    folder.chmod(0o755)  # munged wants its folder safe from other users
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    host = socket.gethostname().split(".")[0]
    text = CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=free_ports(2))
    (folder / "slurm.conf").write_text(text)
    if slurm_version() >= 23:
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    paths = [
        *("--key-file", key, "--socket", folder / "munge.socket", "--pid-file", folder / "munged.pid"),
        *("--log-file", folder / "munged.log", "--seed-file", folder / "munged.seed"),
    ]
    commands = [
        [tool("munged"), "--foreground", "--force", *map(str, paths)],
        [tool("slurmctld"), "-D", "-f", str(folder / "slurm.conf")],
        [tool("slurmd"), "-D", "-N", host, "-f", str(folder / "slurm.conf")],
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            out = (folder / f"{Path(command[0]).name}.out").open("wb")
            running.append(subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **env}))
            time.sleep(1)
        wait_until_idle(folder, env, running)
        yield env
    finally:
        subprocess.run(["scancel", "--full", "--user", getpass.getuser()], env={**os.environ, **env}, check=False)
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def install() -> None:
    """Debian's packages, if they are missing and this user may install them."""
    if all(find(name) for name in DAEMONS):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable(f"needs Slurm: as root, apt-get install {' '.join(PACKAGES)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unavailable(f"apt-get {' '.join(command)} failed: {last}")


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")


def tool(name: str) -> str:
    path = find(name)
    assert path is not None
    return path


def slurm_version() -> int:
    """22 for `slurm-wlm 22.05.8`; from 23 on slurmd wants to be told that there are no cgroups to manage."""
    text = subprocess.run([tool("slurmd"), "-V"], capture_output=True, text=True, check=True).stdout
    return int(text.split()[1].split(".")[0])


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


def wait_until_idle(folder: Path, env: dict[str, str], running: list[subprocess.Popen[bytes]]) -> None:
    """Until the node takes jobs."""
    for _ in range(60):
        for process in running:
            if process.poll() is not None:
                name = Path(str(process.args[0])).name  # type: ignore[index]
                logs = "\n".join(p.read_text(errors="replace")[-2000:] for p in folder.glob(f"{name}*.[lo][ou][gt]"))
                raise Unavailable(f"{name} ended with {process.returncode}: {logs}")
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format", "%T"],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.stdout.strip() == "idle":
            return
        time.sleep(1)
    raise Unavailable(f"Slurm's node is not idle after a minute: {asked.stdout} {asked.stderr}")
