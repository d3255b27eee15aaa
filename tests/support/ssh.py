"""A throw-away ssh: keys, servers and a client that leave the user's own alone."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from support.hosts import Host

SSHD = "/usr/sbin/sshd"
SEPARATION = Path("/run/sshd")  # an empty folder that sshd insists on


def why_not() -> str:
    """What this machine lacks, or nothing."""
    missing = [name for name in ("ssh", "pdsh", SSHD) if not shutil.which(name)]
    return f"needs {' and '.join(missing)} (openssh-server, pdsh)" if missing else ""


def serve(hosts: tuple[Host, ...], folder: Path) -> Path:
    """Starts a server on each host, which ends with it; returns a folder with an `ssh` that gets in, for PATH."""
    folder.mkdir()
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    SEPARATION.mkdir(exist_ok=True)
    options = {
        "HostKey": key,
        "AuthorizedKeysFile": f"{key}.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
    }
    config = folder / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    for host in hosts:
        host.start(SSHD, "-D", "-e", "-f", config, log=folder / f"{host.name}.log")
    client = folder / "bin" / "ssh"
    client.parent.mkdir()
    safe = f"-F none -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {safe} "$@"\n')
    client.chmod(0o755)
    _wait_for_servers(hosts, folder)
    return client.parent


def _wait_for_servers(hosts: tuple[Host, ...], folder: Path) -> None:
    deadline = time.monotonic() + 30
    for host in hosts:
        log = folder / f"{host.name}.log"
        while "Server listening" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
