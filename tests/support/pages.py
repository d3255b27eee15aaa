"""The commands that README.md and docs/ print, as they are printed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]

FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# of our own and of the launchers: what stands at the start of a line that is to be typed
COMMAND = re.compile(r"^(\$ )?(python|torchrun|deepspeed|tensorboard|make|pip|sbatch|kubectl|reformer-[a-z]+) ")
INLINE = re.compile(r"`((?:python|make) [^`<>]*[^`<>.])`")
RUN = ("bash", "python")


@dataclass(frozen=True)
class Block:
    """A fenced block that a reader would run: commands for bash, or one program in Python."""

    page: str
    line: int
    language: str
    commands: list[str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """In their order."""
    text = (ROOT / page).read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], _split(found[1], found[2]))
        for found in FENCE.finditer(text)
        if found[1] in RUN
    ]


def inline_commands(page: str) -> list[str]:
    """Commands in running text that could be typed as they are: `python tools/...`, `make ...`."""
    return INLINE.findall(FENCE.sub("", (ROOT / page).read_text()))


def hidden_commands(page: str) -> list[str]:
    """Lines that look like commands, in blocks which are not marked as bash."""
    text = (ROOT / page).read_text()
    fenced = [line for found in FENCE.finditer(text) if found[1] not in RUN for line in found[2].splitlines()]
    indented = [line[4:] for line in FENCE.sub("", text).splitlines() if line.startswith("    ")]
    return [line for line in fenced + indented if COMMAND.match(line)]


def _split(language: str, code: str) -> list[str]:
    """A program in Python is one; lines for bash are as many commands as bash finds whole."""
    return list(_commands(code)) if language == "bash" else [code]


def _commands(code: str) -> Iterator[str]:
    lines: list[str] = []
    for line in code.splitlines():
        lines.append(line)
        if _is_whole("\n".join(lines)):
            command, lines = "\n".join(lines), []
            if line.strip() and not line.startswith("#"):
                yield command
    assert not lines, f"bash finds no end to {lines}"


def _is_whole(command: str) -> bool:
    if command.endswith("\\"):
        return False
    check = subprocess.run(["bash", "-n"], input=command + "\n", capture_output=True, text=True)
    return check.returncode == 0 and not check.stderr  # it only warns of a here-document without end
