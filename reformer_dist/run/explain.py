"""`reformer-train --explain KEY`: what a key or a group of keys means."""

from __future__ import annotations

from collections.abc import Sequence

from reformer_dist.config.key_reference import describe, keys, overview, show
from reformer_dist.run.command_line import CONFIG_NAME, parse_command_line
from reformer_dist.run.compose import compose_run

DEFAULT_EXPERIMENT = "experiment=quickstart"


def explain(name: str, arguments: Sequence[str]) -> str:
    """Lines about a key, with its value under the other `arguments`; about a group, or, without a name, about all.

    Raises ConfigError for an unknown name, and for arguments that no run would accept.
    """
    if not name:
        return overview() + "\n"
    if name not in keys() or "[]" in name:
        return describe(name) + "\n"
    line = parse_command_line(arguments)
    value = compose_run(line.overrides, line.files)
    for part in name.split("."):
        value = getattr(value, part)
    shown, words = show(value), [*line.files.arguments(), *line.overrides]
    if line.files.name == CONFIG_NAME and not any(word.startswith("experiment=") for word in words):
        words = [DEFAULT_EXPERIMENT, *words]
    is_default = shown == keys()[name].default
    return describe(name, None if is_default else f"{shown}, with {' '.join(words)}") + "\n"
