"""Versions of installed packages, and `--version` of every command."""

from __future__ import annotations

import argparse
import importlib.metadata

import reformer_dist


def package_version(name: str) -> str | None:
    """None if the package is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_line(command: str) -> str:
    return f"{command} {reformer_dist.__version__}\n"


def add_version(parser: argparse.ArgumentParser) -> None:
    """Adds --version to the parser of a command."""
    parser.add_argument("--version", action="version", version=version_line(parser.prog).strip())
