"""`--version` of every command."""

from __future__ import annotations

import argparse

import reformer_dist


def version_line(command: str) -> str:
    return f"{command} {reformer_dist.__version__}\n"


def add_version(parser: argparse.ArgumentParser) -> None:
    """Adds --version to the parser of a command."""
    parser.add_argument("--version", action="version", version=version_line(parser.prog).strip())
