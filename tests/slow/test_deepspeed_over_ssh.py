"""launch/deepspeed.sh: DeepSpeed's launcher reaches the machines of its hostfile over ssh; they train as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import hosts, ssh
from support.events import scalars
from support.hosts import two_hosts
from support.launch import BIN, run_command, run_ranks
from support.tiny import tiny_overrides, write_tiny_dataset

lacks = hosts.why_not() or ssh.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lacks), reason=lacks)]


def test_two_machines_train_as_one(tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "data")
    one_node = tmp_path / "one-node"
    run_ranks("reformer_dist.train", 2, tiny_overrides(data, one_node, "deepspeed=zero3"))

    overrides = tiny_overrides(data, tmp_path / "run", "deepspeed=zero3")
    launcher = ("launcher=deepspeed", "launcher.hosts=[node1,node2]", "launcher.nproc_per_node=1")
    script, log = tmp_path / "train.sh", tmp_path / "node1.log"
    script.write_text(run_command("reformer-train", *launcher, *overrides))
    with two_hosts() as nodes:
        client = ssh.serve(nodes, tmp_path / "ssh")
        env = {
            "PATH": f"{client}:{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        first = nodes[0].start("bash", script, log=log, **env)
        try:
            status = first.wait(300)
        except subprocess.TimeoutExpired:
            raise AssertionError(log.read_text()) from None
    assert status == 0, log.read_text()
    assert "node2: " in log.read_text() and "2 ranks on cpu" in log.read_text()
    assert scalars(tmp_path / "run", "train/loss") == scalars(one_node, "train/loss")
