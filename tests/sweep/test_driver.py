"""A small sweep of real runs; a second run of the same command does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launch import run_command
from support.tiny import tiny_overrides

pytestmark = pytest.mark.jobs


def test_a_sweep_and_the_same_again(tmp_path: Path, tiny_data: Path) -> None:
    folder = tmp_path / "sweep"
    changed = ("trainer.eval_every=3", "sweep.coverage_rows=1", "sweep.parallel=2")
    words = [*tiny_overrides(tiny_data, folder, *changed), "model.n_hashes=1,2", "data.batch_size=4,0"]
    output = run_command("reformer-train", "--multirun", *words, status=1, timeout=240)
    rows = json.loads((folder / "results.json").read_text())
    assert [row["state"] for row in rows] == ["finished", "finished", "failed", "failed"]
    for row in rows[:2]:
        assert row["step"] == 6 and row["eval/loss"] > 0 and row["perf/tokens_per_s"] > 0
        assert 0 < row["coverage/pairs"] < row["coverage/mass"] <= 1
        assert (folder / row["trial"] / "checkpoints/step-00000006").is_dir()
    assert all("data.batch_size=0" in row["reason"] for row in rows[2:])
    assert f"best: {rows[0]['trial']}" in output and "trainer.max_steps=12" in output
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/trial.log")}
    assert len(before) == 2
    again = run_command("reformer-train", "--multirun", *words, status=1, timeout=240)
    assert "4 trials, 0 to run" in again
    assert json.loads((folder / "results.json").read_text()) == rows
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/trial.log")} == before
