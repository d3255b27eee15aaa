"""A run killed at random times equals an uninterrupted one, and keeps good checkpoints (tools/chaos.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).resolve().parents[2] / "tools" / "chaos.py"


@pytest.mark.slow
def test_a_run_survives_kills() -> None:
    steps = 240  # 120 of them after the last kill: seconds, in which no machine can miss it
    command = [sys.executable, str(CHAOS), "--kills", "3", "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    assert "3 kills, " in done.stdout
    assert "killed while diverging" in done.stdout and "continued by: " in done.stdout
    assert "all bitwise equal" in done.stdout
