"""The README's commands and code run as printed, after a quickstart that is cut short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
# make installs an environment, and tensorboard serves until it is stopped
NOT_RUN = ("make ", "tensorboard ")

pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shell(command: str, cwd: Path) -> str:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    result = subprocess.run(
        command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"$ {command}\n{result.stdout}{result.stderr}"
    return result.stdout


def test_every_command_of_the_readme(tmp_path):
    for name in ("tools", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    first = shell("python tools/quickstart.py trainer.max_steps=10", tmp_path)
    for said in ("held-out bits per byte", "order-0 entropy", "gzip", "go on", "TensorBoard", "def "):
        assert said in first
    assert "nothing to train" in shell("python tools/quickstart.py trainer.max_steps=10", tmp_path)

    commands = [line for block in blocks("bash") for line in block.splitlines() if line]
    run = [command for command in commands if not command.startswith(NOT_RUN)]
    assert len(run) >= 7
    for command in run:
        shell(command, tmp_path)
    for code in blocks("python"):
        (tmp_path / "example.py").write_text(code)
        shell("python example.py", tmp_path)


def test_quickstart_on_a_text_of_ones_own(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(
        "\n\n".join(f"Line {n} of a text that somebody wrote, {n * n} words long." for n in range(4000))
    )
    output = shell(f"python {ROOT}/tools/quickstart.py --text {text} trainer.max_steps=4", tmp_path)
    assert "data/quickstart-mine-" in output and "held-out bits per byte" in output
