"""The commands of docs/launching.md run as printed; other tests here try the files that they print."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from support.launch import BIN
from support.tiny import write_tiny_dataset

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "launching.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data set that the quickstart's configuration names."""
    path = tmp_path_factory.mktemp("page")
    write_tiny_dataset(path / "data" / "quickstart")
    return path


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_command(folder: Path, command: str) -> None:
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    printed = re.search(r"> (\S+)$", command)
    if printed:
        assert "reformer" in (folder / printed[1]).read_text()
    else:
        assert "step 4/4" in done.stdout or "saved" in done.stdout, done.stdout
