"""launch/slurm.sbatch in a real SLURM: preempted, a job saves, queues again, and ends as if nothing had been."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import slurm
from support.events import scalars
from support.launch import BIN, free_port, run_command, run_ranks
from support.slurm import Slurm, cluster
from support.tiny import tiny_overrides, write_tiny_dataset

from reformer_dist.sweep.request import drop_key

lacks = slurm.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lacks), reason=lacks)]
STEPS = 800  # most of them after step 20: time enough for SLURM to make room for the other job
BOUND = 600  # seconds, of a busy machine
CHANGED = ("deepspeed=zero2", f"trainer.max_steps={STEPS}", "trainer.save_every=0")
LAUNCHER = (
    "launcher=slurm",
    "launcher.nnodes=1",
    "launcher.cpus_per_rank=1",
    "launcher.gpus_per_node=0",
    "launcher.time=10",
    'launcher.sbatch=["--partition=low"]',
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm"), free_port(2)) as slurm:
        yield slurm


def submit(queue: Slurm, folder: Path, *arguments: str) -> str:
    """Prints the script and hands it to sbatch, as docs/launching.md does; returns the job's number."""
    script = folder / "train.sbatch"
    script.write_text(run_command("reformer-train", *LAUNCHER, *arguments))
    env = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    return queue.run("sbatch", "--parsable", f"--chdir={folder}", script, **env)


def test_a_preempted_job_ends_as_if_nothing_had_been(queue: Slurm, data: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks("reformer_dist.train", 2, tiny_overrides(data, whole, *CHANGED), timeout=BOUND)
    job = submit(queue, tmp_path, "launcher.nproc_per_node=2", *tiny_overrides(data, run, *CHANGED))
    output = tmp_path / f"reformer-{job}.out"
    wait_for(f" 20/{STEPS} ", output)
    # runs as soon as the other has made room, and then makes room for it
    queue.run("srun", "--partition=high", "--ntasks=2", "true")
    queue.wait_for(job, "COMPLETED", BOUND)
    assert "Restarts=1" in queue.run("scontrol", "--oneliner", "show", "job", job)
    said = output.read_text()
    assert "resuming from" in said and "exit code 75" in said, said
    assert scalars(run, "train/loss") == scalars(whole, "train/loss")


def test_ranks_save_at_the_signal_that_sbatch_was_told(queue: Slurm, data: Path, tmp_path: Path) -> None:
    """At its limit of time, or whenever somebody asks."""
    run = tmp_path / "run"
    steps = ("deepspeed=zero2", "trainer.max_steps=1000000", "trainer.save_every=0")
    options = ("launcher.nproc_per_node=2", 'launcher.sbatch=["--signal=USR1@60","--partition=low"]')
    job = submit(queue, tmp_path, *options, *tiny_overrides(data, run, *steps))
    output = tmp_path / f"reformer-{job}.out"
    wait_for(" 20/", output)
    queue.run("scancel", "--signal=USR1", job)
    wait_for("stopped by a signal: saved step", output)
    wait_for("resuming from", output)
    queue.run("scancel", job)
    queue.wait_for(job, "CANCELLED", BOUND)  # and does not come back
    assert "exit code 75" in output.read_text()


def test_the_tasks_of_an_array_share_a_sweep(queue: Slurm, data: Path, tmp_path: Path) -> None:
    array = ("launcher.nproc_per_node=1", "launcher.array=2")
    overrides = drop_key(tiny_overrides(data, tmp_path / "sweep"), "model.n_hashes")
    job = submit(queue, tmp_path, *array, "--multirun", "model.n_hashes=1,2", *overrides)
    for task in range(2):
        queue.wait_for(f"{job}_{task}", "COMPLETED", BOUND)
        said = (tmp_path / f"reformer-{job}_{task}.out").read_text()
        assert "1 trial" in said, said
    for n_hashes in (1, 2):
        assert len(scalars(tmp_path / "sweep" / f"model.n_hashes-{n_hashes}", "train/loss")) == 6


def wait_for(words: str, path: Path) -> None:
    deadline = time.monotonic() + BOUND
    while not path.is_file() or words not in path.read_text():
        assert time.monotonic() < deadline, path.read_text() if path.is_file() else "no output"
        time.sleep(0.1)
