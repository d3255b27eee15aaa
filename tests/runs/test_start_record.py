"""starts.jsonl and the log files of a run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.launch import run_ranks
from support.tiny import tiny_overrides

from reformer_dist.run.start_record import git_commit, relevant_variables


@pytest.mark.jobs
def test_each_start_is_recorded_and_each_rank_logs_to_a_file(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [*tiny_overrides(tiny_data, folder), "trainer.max_steps=1", "trainer.save_every=1"]
    run_ranks("reformer_dist.train", 2, overrides, forked=True)
    run_ranks("reformer_dist.train", 1, [*overrides, "trainer.max_steps=2"], forked=True)
    nothing_to_do = [*overrides, "trainer.max_steps=2"]
    run_ranks("reformer_dist.train", 1, nothing_to_do, forked=True)
    first, second = map(json.loads, (folder / "starts.jsonl").read_text().splitlines())
    assert (first["step"], first["world_size"]) == (0, 2) and (second["step"], second["world_size"]) == (1, 1)
    [host] = first["hosts"].values()
    assert host == {"device": "cpu", "ranks": [0, 1]}
    assert {"python", "torch", "deepspeed", "reformer_dist"} <= first["versions"].keys()
    log, other = ((folder / f"logs/rank-0000{rank}.log").read_text() for rank in range(2))
    # what was logged before the file was opened, too
    assert "parameters" in log and "step 1/1" in log and "step 2/2" in log and "resuming from" in log
    assert "saved" in log and "step 1/1" in other and "step 2/2" not in other


def test_variables_without_secrets() -> None:
    environment = {
        "OMP_NUM_THREADS": "2",
        "NCCL_DEBUG": "INFO",
        "SLURM_JOB_ID": "17",
        "REFORMER_API_KEY": "hidden",
        "CUDA_TOKEN": "hidden",
        "HOME": "/root",
        "SLURM_JOB_USER": "someone",
    }
    assert list(relevant_variables(environment)) == ["NCCL_DEBUG", "OMP_NUM_THREADS", "SLURM_JOB_ID"]


def test_the_commit_of_a_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None

    def git(*words: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{commit} and changes"
