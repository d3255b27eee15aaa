"""Tokenizers from files: those of datasets, and vocabularies of other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reformer_dist.data.format.dataset_layout import require_count, require_plain_name
from reformer_dist.data.format.id_tokenizer import IdTokenizer
from reformer_dist.data.format.lossy_tokenizer import LossyTokenizer
from reformer_dist.data.format.sentencepiece import SentencePieceTokenizer
from reformer_dist.data.format.tiktoken import is_tiktoken, read_tiktoken
from reformer_dist.data.format.tokenizer import (
    END_OF_TEXT,
    BpeTokenizer,
    ByteTokenizer,
    LossyTokenizerError,
    Tokenizer,
    bytes_to_text,
    configured_eot,
    read_inner,
    tokenizers_package,
)
from reformer_dist.errors import DataError
from reformer_dist.fs.atomic import file_sha256

FILE_KINDS = {"bpe": BpeTokenizer, "lossy": LossyTokenizer}


def load_tokenizer(spec: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a specification from `save`. Raises DataError if its file is missing or differs."""
    kind = spec.get("kind")
    if kind == "bytes" and "first_id" not in spec:
        return ByteTokenizer()
    if kind == "bytes":
        return ByteTokenizer(*(require_count(spec, key, str(folder)) for key in ("first_id", "eos_id")))
    if kind == "ids":
        return IdTokenizer(require_count(spec, "n_ids", str(folder)))
    if kind not in (*FILE_KINDS, "sentencepiece"):
        known = "bytes, ids, bpe, lossy or sentencepiece"
        raise DataError(f"{folder}: tokenizer kind {kind!r} is unknown; it must be {known}")
    path = folder / require_plain_name(spec.get("file"), str(folder))
    tokenizer: Tokenizer
    if kind == "sentencepiece":
        vocab_size = require_count(spec, "vocab_size", str(folder))
        tokenizer = SentencePieceTokenizer(path, vocab_size, spec.get("eot_token"))
    else:
        eot_token = str(spec.get("eot_token", END_OF_TEXT))
        special = bool(spec.get("use_special_tokens"))
        tokenizer = FILE_KINDS[str(kind)].load(path, eot_token, use_special_tokens=special)
    if file_sha256(path) != spec.get("sha256"):
        raise DataError(f"{path}: is not the tokenizer that the shards were written with (sha256 differs)")
    return tokenizer


def open_vocabulary(
    path: Path,
    eot_token: str | None = None,
    *,
    use_special_tokens: bool = False,
    special_tokens: Sequence[str] = (),
    split: str | None = None,
) -> Tokenizer:
    """A tokenizer.json of Hugging Face, the ranks of tiktoken, or a model of SentencePiece, by content.

    eot_token: by default that of a tokenizer_config.json next to it, `</s>` of SentencePiece, or <|endoftext|>.
    special_tokens: added if the vocabulary lacks them. split: of ranks, how text is cut into words.
    Raises DataError if it has no such token, or is none of these.
    """
    if not path.is_file():
        expected = "a tokenizer.json, or a vocabulary of tiktoken or SentencePiece"
        raise DataError(f"{path}: is missing; it must be {expected}")
    ranks = is_tiktoken(path)
    if split is not None and not ranks:
        raise DataError(f"--split-regex {split}: {path} says itself how text is cut into words; leave it out")
    if ranks:
        inner = read_tiktoken(path, split, tokenizers_package(), bytes_to_text)
        eot_token = eot_token or END_OF_TEXT
        special_tokens = [eot_token, *special_tokens]
    elif _is_json(path):
        inner = read_inner(path)
        eot_token = eot_token or configured_eot(path.with_name("tokenizer_config.json")) or END_OF_TEXT
    else:
        if use_special_tokens or special_tokens:
            problem = "SentencePiece has control symbols of its own"
            raise DataError(f"{path}: {problem}; leave out --special-tokens and --add-special-token")
        return SentencePieceTokenizer(path, eot_token=eot_token)
    inner.add_special_tokens(list(special_tokens))
    try:
        return BpeTokenizer(inner, str(path), eot_token=eot_token, use_special_tokens=use_special_tokens)
    except LossyTokenizerError:
        return LossyTokenizer(inner, str(path), eot_token=eot_token, use_special_tokens=use_special_tokens)


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return path.suffix == ".json"
