"""What `make` does before it installs anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD = """#!/bin/sh
exec {python} -c "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])" "$2"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(clone: Path, *words: str, status: int = 0) -> str:
    command = ["make", "--no-print-directory", *words]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_an_old_python_is_refused_before_anything_is_made(clone: Path) -> None:
    old = clone / "python3.9"
    old.write_text(OLD.format(python=sys.executable))
    old.chmod(0o755)
    output = make(clone, "install", f"PYTHON={old}", status=2)
    assert "is Python 3.9" in output and "3.10 or newer" in output
    assert not (clone / ".venv").exists()


def test_an_environment_of_another_python_is_made_anew(clone: Path) -> None:
    environment = clone / ".venv" / "bin"
    environment.mkdir(parents=True)
    here = f"PYTHON={sys.executable}"
    (environment.parent / "installed").touch()
    assert "venv --clear" in make(clone, "--dry-run", "install", here)  # its Python is gone
    (environment / "python").symlink_to(sys.executable)
    (environment.parent / "installed").touch()
    assert "venv" not in make(clone, "--dry-run", "install", here)
    (environment / "python").unlink()
    (environment / "python").write_text(OLD.format(python=sys.executable))
    (environment / "python").chmod(0o755)
    (environment.parent / "installed").touch()
    assert "venv --clear" in make(clone, "--dry-run", "install", here)
    assert "venv" not in make(clone, "--dry-run", "install")  # nobody asked for another one


def test_options_of_the_quickstart(clone: Path) -> None:
    words = ("TEXT=mine.txt", "HELDOUT=a.txt b.txt", "STEPS=4", "PROMPT=Once upon")
    output = " ".join(make(clone, "--dry-run", "quickstart", *words).split())
    assert '--text "mine.txt" --heldout a.txt b.txt \\ --prompt "Once upon" trainer.max_steps=4' in output
