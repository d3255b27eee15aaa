"""Tokenizers of converted models: detection in their files, and export to Hugging Face's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reformer_dist.data import BpeTokenizer, ByteTokenizer, Tokenizer
from reformer_dist.data.format.sentencepiece import FILE as SPIECE
from reformer_dist.data.format.sentencepiece import SentencePieceTokenizer
from reformer_dist.errors import ConfigError, DataError

TOKENIZER_FILE = "tokenizer.json"
RESERVED_FIRST, RESERVED_END = 2, 1  # bytes of Trax and google/reformer-enwik8: 0 is padding, 1 ends a text
BYTES: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "bytes+2": lambda: ByteTokenizer(RESERVED_FIRST, RESERVED_END),
}


def find_tokenizer(directory: Path, vocab_size: int, named: str | None) -> Tokenizer:
    """The tokenizer with vocab_size ids that is named (bytes, bytes+2 or a file), or else found in the directory.

    Raises ConfigError for an unknown name, and DataError if no vocabulary is found or its size differs.
    """
    tokenizer = _by_name(named, vocab_size) if named is not None else _by_files(directory, vocab_size)
    if tokenizer.vocab_size != vocab_size:
        origin = named or directory
        raise DataError(f"{origin}: has {tokenizer.vocab_size} tokens; must have {vocab_size}, as the model")
    return tokenizer


def _by_name(named: str, vocab_size: int) -> Tokenizer:
    if named in BYTES:
        return BYTES[named]()
    path = Path(named)
    if not path.is_file():
        raise ConfigError(f"--tokenizer {named}: must be {', '.join(BYTES)}, a {TOKENIZER_FILE} or a {SPIECE}")
    return BpeTokenizer.load(path) if path.suffix == ".json" else SentencePieceTokenizer(path, vocab_size)


def _by_files(directory: Path, vocab_size: int) -> Tokenizer:
    if (directory / SPIECE).is_file():
        return SentencePieceTokenizer(directory / SPIECE, vocab_size)
    if (directory / TOKENIZER_FILE).is_file():
        return BpeTokenizer.load(directory / TOKENIZER_FILE)
    if vocab_size == 256 + RESERVED_FIRST:
        return BYTES["bytes+2"]()  # google/reformer-enwik8, which documents this only in its model card
    raise DataError(
        f"{directory}: has no vocabulary ({SPIECE} or {TOKENIZER_FILE}) for {vocab_size} tokens; "
        f"pass --tokenizer {', '.join(BYTES)} or the path of such a file"
    )


def hugging_face_files(tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    """Writes files for AutoTokenizer; returns the specification of `Tokenizer.save`."""
    specification = tokenizer.save(directory)
    settings: dict[str, Any] = {}
    if specification["kind"] == "sentencepiece":
        settings = {"tokenizer_class": "ReformerTokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    elif specification["kind"] == "bpe":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return specification
