"""A SLURM of one machine in a folder of its own: munge, the controller and a node."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CORES = 2
DAEMONS = ("slurmd", "slurmctld", "munged")
BOUND = 120  # seconds, on a busy machine
# A job of partition `high` takes the node from those of `low`, which are told and have a minute to end. A job that
# goes back to the queue waits until its credential has expired, of which five seconds are left instead of 120.
CONFIG = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={next_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def why_not() -> str:
    """What this machine lacks, or nothing."""
    missing = [name for name in (*DAEMONS, "sbatch") if not _find(name)]
    if missing:
        return f"needs {', '.join(missing)} (slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "needs root, for SLURM"
    if (os.cpu_count() or 1) < CORES:
        return f"needs {CORES} cores, for SLURM"
    return ""


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: object, **env: str) -> str:
        """What a command of SLURM prints, such as squeue."""
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=BOUND, env=self.env | env)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Such as RUNNING, PENDING or COMPLETED."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(each.removeprefix("JobState=") for each in fields if each.startswith("JobState="))

    def wait_for(self, job: str, state: str, seconds: float = 2 * BOUND) -> None:
        deadline = time.monotonic() + seconds
        while (now := self.state(job)) != state:
            assert time.monotonic() < deadline, f"job {job} is {now}, not {state}"
            time.sleep(0.2)


@contextmanager
def cluster(folder: Path, port: int) -> Iterator[Slurm]:
    """Needs two ports, of which this is the first. All that it started ends with it."""
    for name in ("spool", "state"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    host = os.uname().nodename.partition(".")[0]
    config = CONFIG.format(folder=folder, host=host, port=port, next_port=port + 1, cores=CORES)
    (folder / "slurm.conf").write_text(config)
    slurm = Slurm(folder)
    files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munge.log"}
    options = [f"--{name}={folder}/{file}" for name, file in ({**files, "seed-file": "munge.seed"}).items()]
    try:
        slurm.run(_find("munged"), "--force", *options)
        slurm.run(_find("slurmctld"))
        slurm.run(_find("slurmd"))
        _wait_for_node(slurm)
        yield slurm
    finally:
        for job in slurm.run("squeue", "--noheader", "--format=%i").split():
            slurm.run("scancel", "--full", job)
        for name in DAEMONS:
            _end(folder / f"{name}.pid")


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _wait_for_node(slurm: Slurm) -> None:
    deadline = time.monotonic() + BOUND
    while slurm.run("sinfo", "--noheader", "--format=%T", "--partition=low") != "idle":
        assert time.monotonic() < deadline, slurm.run("sinfo")
        time.sleep(0.2)


def _end(pid_file: Path) -> None:
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
