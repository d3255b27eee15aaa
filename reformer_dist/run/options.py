"""Options of reformer-train besides those of Hydra, which does not know them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reformer_dist.errors import ConfigError

DRY_RUN, PLOT, VOCAB_SIZE, EXPLAIN, VERSION = "--dry-run", "--plot", "--vocab-size", "--explain", "--version"


@dataclass(frozen=True)
class Options:
    """What a command line asks for instead of a run."""

    dry_run: str | None
    """--dry-run, or --dry-run=SIZE."""
    plot: Path | None
    vocab_size: int | None
    explain: str | None
    """The key or group to explain; empty for the groups."""
    version: bool
    rest: list[str]
    """The other arguments, for Hydra."""


def take_options(arguments: Sequence[str]) -> Options:
    """Takes the options out of a command line; their values follow as `--option=value` or `--option value`.

    Raises ConfigError.
    """
    taken: dict[str, str] = {}  # the last of each wins
    rest: list[str] = []
    words = list(arguments)
    while words:
        name, equals, value = (word := words.pop(0)).partition("=")
        if name not in (DRY_RUN, PLOT, VOCAB_SIZE, EXPLAIN) and word != VERSION:
            rest.append(word)
        else:
            has_value = bool(words) and not equals and word != VERSION and _is_value(words[0])
            taken[name] = f"={words.pop(0)}" if has_value else f"{equals}{value}"
    plot = taken.get(PLOT)
    if plot is not None and DRY_RUN not in taken:
        raise ConfigError(f"{PLOT}{plot}: needs {DRY_RUN}, whose schedule it draws")
    if plot in ("", "="):
        raise ConfigError(f"{PLOT}{plot}: must name a file, such as {PLOT}=schedule.png")
    size = VOCAB_SIZE + taken[VOCAB_SIZE] if VOCAB_SIZE in taken else None
    if size is not None and DRY_RUN not in taken:
        raise ConfigError(f"{size}: needs {DRY_RUN}; a run has the vocabulary of its dataset")
    vocab_size = None if size is None else _read_vocab_size(size)
    dry_run = DRY_RUN + taken[DRY_RUN] if DRY_RUN in taken else None
    explain = taken[EXPLAIN].removeprefix("=") if EXPLAIN in taken else None
    return Options(dry_run, Path(plot[1:]) if plot else None, vocab_size, explain, VERSION in taken, rest)


def _is_value(word: str) -> bool:
    """Whether a word can belong to the option before it: it is neither an option nor an override."""
    return "=" not in word and not word.startswith(("-", "~"))


def _read_vocab_size(flag: str) -> int:
    size = flag.partition("=")[2]
    if not re.fullmatch(r"[0-9]{1,9}", size) or int(size) < 2:
        example = f"{VOCAB_SIZE}=257 for bytes and the end of documents"
        raise ConfigError(f"{flag}: must be a number of tokens from 2 on, such as {example}")
    return int(size)
