"""Vocabularies of tiktoken: a file of byte sequences with their ranks, as a BPE of the package `tokenizers`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reformer_dist.errors import DataError

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base"), _GPT2),
    "cl100k_base": rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "o200k_base": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
}
"""Regular expressions that cut text into words, by the name of the encoding; files of ranks do not hold them."""


def is_tiktoken(path: Path) -> bool:
    """Whether a file holds ranks: of each line, base64 and a number. Llama 3's tokenizer.model does."""
    with path.open("rb") as file:
        words = file.readline(4096).split()
    try:
        return len(words) == 2 and words[1].isdigit() and bool(base64.b64decode(words[0], validate=True))
    except binascii.Error:
        return False


def read_tiktoken(path: Path, split: str | None, package: Any, to_text: Callable[[bytes], str]) -> Any:
    """A `tokenizers.Tokenizer` with the ids of the ranks.

    split: a name of SPLIT_PATTERNS or a regular expression; None for that of the file's name. package: the
    tokenizers package. to_text: writes bytes in its byte-level alphabet. Raises DataError.
    """
    ranks = _read_ranks(path)
    split = split or path.stem
    pattern = SPLIT_PATTERNS.get(split, split)
    if pattern == path.stem:
        known = ", ".join(SPLIT_PATTERNS)
        hint = f"name it by --split-regex: {known}, or a regex"
        raise DataError(f"{path}: does not say how text is cut into words; {hint}")
    merges: list[tuple[int, int, int, bytes, bytes]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    model = package.models.BPE(
        {to_text(token): rank for token, rank in ranks.items()},
        [(to_text(left), to_text(right)) for *_, left, right in merges],
        ignore_merges=True,
    )
    inner = package.Tokenizer(model)
    try:
        words = package.pre_tokenizers.Split(package.Regex(pattern), "isolated")
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"--split-regex {pattern}: is not a regular expression ({error})") from error
    as_bytes = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = package.pre_tokenizers.Sequence([words, as_bytes])
    inner.decoder = package.decoders.ByteLevel()
    return inner


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        words = line.split()
        try:
            token, rank = base64.b64decode(words[0], validate=True), int(words[1])
        except (ValueError, IndexError) as error:  # binascii.Error is a ValueError
            raise DataError(f"{path}:{number}: is {line[:40]!r}; each line must be base64 and a rank") from error
        if not token or ranks.setdefault(token, rank) != rank:
            raise DataError(f"{path}:{number}: token {token!r} is empty or has two ranks")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path}: its ranks must be 0 to {len(ranks) - 1}, each once")
    return ranks
