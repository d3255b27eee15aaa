"""Tokenizers of converted models: detection from their files, and export to Hugging Face's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reformer_dist.data import BpeTokenizer, ByteTokenizer, Tokenizer
from reformer_dist.data.format.dataset_layout import TOKENIZER_FILE
from reformer_dist.data.format.sentencepiece import SPIECE_FILE, SentencePieceTokenizer
from reformer_dist.data.format.tokenizer import END_OF_TEXT
from reformer_dist.errors import ConfigError, DataError

RESERVED_FIRST, RESERVED_END = 2, 1  # bytes of Trax and google/reformer-enwik8: 0 is padding, 1 ends a text
BYTES: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "bytes+2": lambda: ByteTokenizer(RESERVED_FIRST, RESERVED_END),
}


def find_tokenizer(directory: Path, vocab_size: int, name: str | None) -> Tokenizer:
    """The tokenizer with vocab_size ids: `name` (bytes, bytes+2 or a file) or, if it is None, the directory's.

    Raises ConfigError for an unknown name, and DataError if no vocabulary is found or its size differs.
    """
    if name in BYTES:
        tokenizer = BYTES[name]()
    elif name is not None and not Path(name).is_file():
        known = f"{', '.join(BYTES)}, a {TOKENIZER_FILE} or a {SPIECE_FILE}"
        raise ConfigError(f"--tokenizer {name}: must be {known}")
    elif name is not None:
        is_bpe = Path(name).suffix == ".json"
        tokenizer = BpeTokenizer.load(Path(name)) if is_bpe else SentencePieceTokenizer(Path(name), vocab_size)
    elif (directory / SPIECE_FILE).is_file():
        tokenizer = SentencePieceTokenizer(directory / SPIECE_FILE, vocab_size)
    elif (directory / TOKENIZER_FILE).is_file():
        tokenizer = BpeTokenizer.load(directory / TOKENIZER_FILE)
    elif vocab_size == 256 + RESERVED_FIRST:
        tokenizer = BYTES["bytes+2"]()  # google/reformer-enwik8, which documents this only in its model card
    else:
        raise DataError(
            f"{directory}: has no vocabulary ({SPIECE_FILE} or {TOKENIZER_FILE}) for {vocab_size} tokens; "
            f"pass --tokenizer {', '.join(BYTES)} or the path of such a file"
        )
    if tokenizer.vocab_size != vocab_size:
        expected = f"must have {vocab_size}, as in the model"
        raise DataError(f"{name or directory}: has {tokenizer.vocab_size} tokens; {expected}")
    return tokenizer


def hugging_face_files(tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    """Writes files for AutoTokenizer; returns the specification of `Tokenizer.save`."""
    specification = tokenizer.save(directory)
    settings = {
        "sentencepiece": {"tokenizer_class": "ReformerTokenizer", "eos_token": "</s>", "unk_token": "<unk>"},
        "bpe": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": specification.get("eot_token", END_OF_TEXT),
        },
    }
    settings["lossy"] = settings["bpe"]
    if specification["kind"] in settings:
        content = json.dumps(settings[specification["kind"]], indent=1)
        (directory / "tokenizer_config.json").write_text(content + "\n")
    return specification
