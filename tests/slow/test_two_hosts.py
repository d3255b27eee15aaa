"""launch/torchrun.sh on two machines: they train as one, and outlive the loss of a rank and of a machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hosts
from support.events import scalars
from support.hosts import Host, two_hosts
from support.launch import BIN, run_command, run_ranks
from support.tiny import tiny_overrides, write_tiny_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not()),
]
STEPS = 300  # most of them after step 20, where the tests kill: seconds, in which no machine can miss it
CHANGED = ("deepspeed=zero2", f"trainer.max_steps={STEPS}", "trainer.save_every=10")
RANK = "-m reformer_dist.train"  # in the command line of torchrun and of a rank
AGENT = "torchrun"
BOUND = 600  # seconds, on a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def losses(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Of a run of two ranks on one machine that nothing disturbs."""
    run = tmp_path_factory.mktemp("runs") / "one-node"
    run_ranks("reformer_dist.train", 2, tiny_overrides(data, run, *CHANGED))
    return scalars(run, "train/loss")


@pytest.fixture
def nodes() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


class Job:
    """The rendered script, started on both machines."""

    def __init__(self, nodes: tuple[Host, Host], data: Path, folder: Path, *changed: str) -> None:
        self.run = folder / "run"
        names = ",".join(node.name for node in nodes)
        launcher = ("launcher=torchrun", f"launcher.hosts=[{names}]", "launcher.nproc_per_node=1", *changed)
        script = folder / "train.sh"
        script.write_text(run_command("reformer-train", *launcher, *tiny_overrides(data, self.run, *CHANGED)))
        self.logs = [folder / f"{node.name}.log" for node in nodes]
        env = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PET_RDZV_CONF": "last_call_timeout=5",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.nodes = [
            node.start("bash", script, log=log, **env) for node, log in zip(nodes, self.logs, strict=True)
        ]

    def wait_for(self, words: str) -> None:
        """Until one of the machines has said these words."""
        deadline = time.monotonic() + BOUND
        while words not in self.said():
            assert time.monotonic() < deadline, self.said()
            assert any(node.poll() is None for node in self.nodes), self.said()
            time.sleep(0.1)

    def end(self, number: int) -> int:
        try:
            return self.nodes[number].wait(BOUND)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None

    def said(self) -> str:
        return "\n".join(f"--- {log.stem}\n{log.read_text(errors='replace')}" for log in self.logs)


def test_two_machines_train_as_one(nodes, data, losses, tmp_path):
    job = Job(nodes, data, tmp_path)
    assert [job.end(0), job.end(1)] == [0, 0], job.said()
    assert "2 ranks on cpu" in job.said()
    assert scalars(job.run, "train/loss") == losses


def test_a_killed_rank_starts_again_on_both_machines(nodes, data, losses, tmp_path):
    job = Job(nodes, data, tmp_path)
    job.wait_for(f" 20/{STEPS} ")
    agents = nodes[1].processes(AGENT)
    for pid in set(nodes[1].processes(RANK)) - set(agents):
        os.kill(pid, 9)
    assert [job.end(0), job.end(1)] == [0, 0], job.said()
    assert "resuming from" in job.said()
    assert scalars(job.run, "train/loss") == losses


def test_a_lost_machine_leaves_the_other_going_on(nodes, data, losses, tmp_path):
    job = Job(nodes, data, tmp_path, "launcher.min_nodes=1")
    job.wait_for(f" 20/{STEPS} ")
    nodes[1].kill()
    assert job.end(0) == 0, job.said()
    assert "1 rank on cpu" in job.said() and "resuming from" in job.said()
    assert scalars(job.run, "train/loss") == pytest.approx(losses, rel=1e-4)
