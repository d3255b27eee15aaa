"""Differences between two saved configurations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def config_changes(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Lines such as "optim.lr: 0.003 -> 0.001" for each difference between two saved configurations."""
    before, after = dict(flatten(first)), dict(flatten(second))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all leaves, with the keys of the command line."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
