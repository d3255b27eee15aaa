"""Tokenizers: bytes, or byte-level BPE from the `tokenizers` package.

Both are lossless, unlike SentencePiece, which only converted models use. Each tokenizer provides the bytes of text
per token, so that losses of models with different vocabularies can be compared in bits per byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.dataset_layout import (
    TOKENIZER_FILE,
    id_dtype,
    require_count,
    require_plain_name,
)
from reformer_dist.data.format.id_tokenizer import IdTokenizer
from reformer_dist.data.format.sentencepiece import SentencePieceTokenizer
from reformer_dist.errors import DataError
from reformer_dist.fs.atomic import file_sha256

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Interface of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, including end-of-text."""

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""

    @property
    def dtype(self) -> str:
        """dtype that stores token ids: uint8, uint16 or uint32."""

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] bytes of text of each token; 0 for end-of-text."""

    @property
    def is_lossless(self) -> bool:
        """Whether UTF-8 text is preserved byte for byte, so that byte offsets can be mapped to tokens."""

    def normalize(self, text: bytes) -> bytes:
        """The text that `encode` preserves: invalid UTF-8 replaced by U+FFFD, or normalized by SentencePiece."""

    def encode(self, text: bytes) -> NDArray[Any]:
        """Token ids of a text, [n_tokens] of `dtype`, without end-of-text."""

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of token ids, without end-of-text tokens and with invalid UTF-8 replaced by U+FFFD."""

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """Bytes of token ids, with invalid UTF-8 preserved if the tokenizer can represent it."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the tokenizer's files to a folder. Returns the specification for `load_tokenizer`."""


class ByteTokenizer:
    """One token per byte: ids first_id .. first_id + 255, by default from 0, with end-of-text as 256."""

    is_lossless = True

    def __init__(self, first_id: int = 0, eos_id: int = 256) -> None:
        self._first_id, self.eos_id = first_id, eos_id
        self.vocab_size = max(first_id + 256, eos_id + 1)
        self.dtype = "uint8" if first_id == 0 else "uint16"

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        lengths[self._first_id : self._first_id + 256] = 1
        return lengths

    def normalize(self, text: bytes) -> bytes:
        return text

    def encode(self, text: bytes) -> NDArray[Any]:
        ids = np.frombuffer(text, dtype=np.uint8)
        return ids if self._first_id == 0 else ids.astype(self.dtype) + self._first_id

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        array = np.asarray(ids, dtype=np.int64) - self._first_id
        return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes()

    def save(self, folder: Path) -> dict[str, Any]:
        if self._first_id == 0:
            return {"kind": "bytes"}
        return {"kind": "bytes", "first_id": self._first_id, "eos_id": self.eos_id}


class BpeTokenizer:
    """Byte-level BPE. Its vocabulary contains all 256 bytes, so any UTF-8 text is preserved."""

    is_lossless = True

    def __init__(self, inner: Any, origin: str) -> None:
        """inner: a `tokenizers.Tokenizer`. origin: its name in error messages.

        Raises DataError if it is not byte-level or has no end-of-text token.
        """
        eos_id = inner.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise DataError(f"{origin}: has no token {END_OF_TEXT}; it must have one to end documents with")
        vocabulary = inner.get_vocab(with_added_tokens=False)
        if not set(_package().pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys():
            raise DataError(f"{origin}: is not a byte-level BPE; its vocabulary must hold all 256 bytes")
        inner.no_truncation()
        inner.no_padding()
        # a document that contains the text of the end-of-text token must not end there
        inner.encode_special_tokens = True
        self._inner = inner
        self.eos_id: int = eos_id
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        probe = " A\n\n  b\t\u00e9e\u0301\ufb01 \u4e2d\U0001f600" + END_OF_TEXT
        if self.decode(self.encode(probe.encode())) != probe:
            raise DataError(f"{origin}: changes text; it must be a byte-level BPE without a normalizer")

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> BpeTokenizer:
        """Trains on texts. With too little text the vocabulary is smaller than `vocab_size`."""
        if vocab_size < 257:
            raise DataError(f"vocab_size={vocab_size}: must be at least 257, 256 bytes and {END_OF_TEXT}")
        package = _package()
        inner = package.Tokenizer(package.models.BPE())
        inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        inner.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer=trainer)
        return cls(inner, origin="the trained tokenizer")

    @classmethod
    def load(cls, path: Path) -> BpeTokenizer:
        """Reads a tokenizer.json of the `tokenizers` package."""
        if not path.is_file():
            raise DataError(f"{path}: is missing; it must be a tokenizer.json of the tokenizers package")
        package = _package()
        try:
            inner = package.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise DataError(f"{path}: is not a tokenizer.json of the tokenizers package ({error})") from error
        return cls(inner, origin=str(path))

    @property
    def dtype(self) -> str:
        return id_dtype(self.vocab_size)

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._inner.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # the byte-level alphabet writes each byte as one character
        for index, added in self._inner.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    def normalize(self, text: bytes) -> bytes:
        return text.decode("utf-8", errors="replace").encode()

    def encode(self, text: bytes) -> NDArray[Any]:
        string = text.decode("utf-8", errors="replace")
        # "fast" omits character offsets, which take more memory than the text
        [encoding] = self._inner.encode_batch_fast([string], add_special_tokens=False)
        return np.array(encoding.ids, dtype=self.dtype)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        return self._inner.decode([int(index) for index in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        return self.decode(ids).encode()

    def save(self, folder: Path) -> dict[str, Any]:
        path = folder / TOKENIZER_FILE
        self._inner.save(str(path))
        return {"kind": "bpe", "file": path.name, "sha256": file_sha256(path)}


def load_tokenizer(spec: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a specification from `save`. Raises DataError if its file is missing or differs."""
    kind = spec.get("kind")
    if kind == "bytes" and "first_id" not in spec:
        return ByteTokenizer()
    if kind == "bytes":
        return ByteTokenizer(*(require_count(spec, key, str(folder)) for key in ("first_id", "eos_id")))
    if kind == "ids":
        return IdTokenizer(require_count(spec, "n_ids", str(folder)))
    if kind not in ("bpe", "sentencepiece"):
        raise DataError(
            f"{folder}: tokenizer kind {kind!r} is unknown; it must be bytes, ids, bpe or sentencepiece"
        )
    path = folder / require_plain_name(spec.get("file"), str(folder))
    tokenizer: Tokenizer
    if kind == "bpe":
        tokenizer = BpeTokenizer.load(path)
    else:
        tokenizer = SentencePieceTokenizer(path, require_count(spec, "vocab_size", str(folder)))
    if file_sha256(path) != spec.get("sha256"):
        raise DataError(f"{path}: is not the tokenizer that the shards were written with (sha256 differs)")
    return tokenizer


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("BPE needs the package tokenizers: pip install 'reformer_dist[bpe]'") from error
    return tokenizers
