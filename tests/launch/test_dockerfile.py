"""launch/Dockerfile: its instructions and files; built where there is a Docker daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
INSTRUCTIONS = {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_instructions_and_copied_files() -> None:
    found = instructions()
    assert found[0][0] == "FROM" and {name for name, _ in found} <= INSTRUCTIONS
    copied = [word for name, rest in found if name == "COPY" for word in rest.split()[:-1]]
    assert {"pyproject.toml", "conf", "reformer_dist"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)


def test_extras_and_the_command_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    [extras] = re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE.read_text())
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    [command] = [rest for name, rest in instructions() if name == "CMD"]
    assert f"{command.strip('[]').strip(chr(34))} = " in project


def has_daemon() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=60).returncode == 0


@pytest.mark.slow
def test_it_builds() -> None:
    if not has_daemon():
        pytest.skip("needs a Docker daemon")
    command = ["docker", "build", "-f", str(DOCKERFILE), "-t", "reformer_dist:test", str(ROOT)]
    subprocess.run(command, check=True, timeout=1800)
    subprocess.run(["docker", "run", "--rm", "reformer_dist:test"], check=True, timeout=600)
