"""Two machines on one: network namespaces with an address, a host name and an /etc/hosts of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
NAMES = ("node1", "node2")
OVERLAYS = Path("/etc/netns")  # `ip netns exec` lays the files in it over those of /etc


@dataclass(frozen=True)
class Host:
    name: str
    namespace: str

    def start(self, *command: object, log: Path, **env: str) -> subprocess.Popen[bytes]:
        """Runs a command there, as root; what it prints goes to `log`."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        named = ["bash", "-c", 'hostname "$0" && exec "$@"', self.name]
        with log.open("wb") as output:
            return subprocess.Popen(
                [*enter, *named, *map(str, command)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | env,
            )

    def processes(self, words: str = "") -> list[int]:
        """Ids of what runs there and has these words in its command line."""
        said = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        ).stdout
        return [pid for pid in map(int, said.split()) if words in _command_line(pid)]

    def kill(self, words: str = "") -> None:
        for pid in self.processes(words):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def why_not() -> str:
    """What this machine lacks, or nothing."""
    missing = [name for name in ("ip", "unshare") if not shutil.which(name)]
    if missing:
        return f"needs {' and '.join(missing)} (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    probe = f"probe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode != 0:
        return "needs the right to make network namespaces"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """node1 and node2, which reach each other by name and nothing else; what runs there ends with them."""
    first, second = (Host(name, f"reformer{os.getpid()}-{name}") for name in NAMES)
    try:
        for host in (first, second):
            _run("ip", "netns", "add", host.namespace)
            overlay = OVERLAYS / host.namespace
            overlay.mkdir(parents=True)
            lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{n} {name}" for n, name in enumerate(NAMES, 1))]
            (overlay / "hosts").write_text("\n".join(lines) + "\n")
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        ends = [
            "eth0",
            "netns",
            first.namespace,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            second.namespace,
        ]
        _run("ip", "link", "add", *ends)
        for number, host in enumerate((first, second), 1):
            _run("ip", "-n", host.namespace, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
        yield first, second
    finally:
        for host in (first, second):
            with suppress(subprocess.CalledProcessError):
                host.kill()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
            shutil.rmtree(OVERLAYS / host.namespace, ignore_errors=True)
        with suppress(OSError):
            OVERLAYS.rmdir()


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
