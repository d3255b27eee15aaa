"""Tokenizers: bytes, or BPE of bytes from the `tokenizers` package.

Both are lossless, unlike BPE with byte fallback and SentencePiece, which only converted models use. Each tokenizer
provides the bytes of text per token, so that losses of models with different vocabularies can be compared in bits
per byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.dataset_layout import (
    TOKENIZER_FILE,
    id_dtype,
)
from reformer_dist.data.format.sentencepiece import SPACE
from reformer_dist.errors import DataError
from reformer_dist.fs.atomic import file_sha256

END_OF_TEXT = "<|endoftext|>"
# beginnings that a prefix space would change, and one that it would not; characters that normalizers change
PROBES = ("A b", "1", "\n", "\u00e9", " A\n\n  b\t\u00e9e\u0301\ufb01 \u4e2d\U0001f600")


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


class LossyTokenizerError(DataError):
    """A tokenizer.json that changes text."""


class BpeTokenizer:
    """BPE whose vocabulary contains all 256 bytes: byte-level, or with byte fallback as in Llama 2.

    Byte-level BPE preserves any UTF-8 text. With byte fallback, U+2581 becomes a space. The text of special tokens
    is encoded as plain text, or with use_special_tokens as these tokens; that of end-of-text always is plain text,
    since a document that contains it must not end there.
    """

    def __init__(
        self, inner: Any, origin: str, *, eot_token: str = END_OF_TEXT, use_special_tokens: bool = False
    ) -> None:
        """inner: a `tokenizers.Tokenizer`. origin: its name in error messages. eot_token: ends documents.

        Raises DataError if it lacks the end-of-text token or encodes at random, and LossyTokenizerError if it
        lacks bytes or changes text.
        """
        eos_id = inner.token_to_id(eot_token)
        if eos_id is None:
            special = [token.content for token in inner.get_added_tokens_decoder().values() if token.special]
            hint = "name it by reformer-shards --eot-token, or eos_token in a tokenizer_config.json next to it"
            problem = f"has no token {eot_token} to end documents with; its special tokens are"
            raise DataError(f"{origin}: {problem} {', '.join(special[:8]) or 'none'}: {hint}")
        if getattr(inner.model, "dropout", None):
            problem = "encodes the same text in different ways; must be null"
            raise DataError(f"{origin}: model.dropout={inner.model.dropout:g}: {problem}")
        inner.no_truncation()
        inner.no_padding()
        self._inner, self._eot_token, self._uses_special = inner, eot_token, use_special_tokens
        self.is_lossless = not bool(getattr(inner.model, "byte_fallback", False))
        self.eos_id: int = eos_id
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        inner.encode_special_tokens = True
        self._eot_spelled = self._encode(eot_token)
        inner.encode_special_tokens = not use_special_tokens
        self._check(origin)

    def _check(self, origin: str) -> None:
        """Raises DataError if text may become end-of-text, and LossyTokenizerError if text is changed."""
        vocabulary = self._inner.get_vocab(with_added_tokens=False)
        all_bytes = byte_alphabet() if self.is_lossless else [f"<0x{byte:02X}>" for byte in range(256)]
        if not set(all_bytes) <= vocabulary.keys():
            problem = "is not a byte-level BPE, nor one with byte_fallback"
            raise LossyTokenizerError(f"{origin}: {problem}; its vocabulary must hold all 256 bytes")
        added, token_bytes = self._inner.get_added_tokens_decoder().values(), self.token_bytes
        tokens = "".join(f"  {token.content}  x" for token in added if self._uses_special or not token.special)
        for probe in (*PROBES, f"x{tokens}"):
            ids = self.encode((probe + self._eot_token).encode())
            if self.eos_id in ids:
                problem = "is what its own text is encoded as; it must be a special token"
                raise DataError(f"{origin}: the end-of-text token {self._eot_token} {problem}")
            text = self.decode(ids)
            if text == f" {probe}{self._eot_token}":
                hint = "set add_prefix_space to false in it"
                problem = "changes text: adds a space to the beginning of each document"
                raise LossyTokenizerError(f"{origin}: {problem}; {hint}")
            n_bytes = token_bytes[ids].sum()
            if text != probe + self._eot_token or (self.is_lossless and n_bytes != len(text.encode())):
                problem = f"changes text: {probe[:40]!r} becomes {text[:40]!r}"
                raise LossyTokenizerError(f"{origin}: {problem}; it must be a BPE of bytes without a normalizer")

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int, special_tokens: Sequence[str] = ()) -> BpeTokenizer:
        """Trains on texts. With too little text the vocabulary is smaller than `vocab_size`.

        special_tokens: in the vocabulary besides end-of-text.
        """
        if vocab_size < 257:
            raise DataError(f"vocab_size={vocab_size}: must be at least 257, 256 bytes and {END_OF_TEXT}")
        package = tokenizers_package()
        inner = package.Tokenizer(package.models.BPE())
        inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        inner.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, *special_tokens],
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer=trainer)
        return cls(inner, origin="the trained tokenizer")

    @classmethod
    def load(cls, path: Path, eot_token: str | None = None, *, use_special_tokens: bool = False) -> BpeTokenizer:
        """Reads a tokenizer.json of the `tokenizers` package.

        eot_token: None is the eos_token of a tokenizer_config.json next to it, if there is one with it.
        """
        if not path.is_file():
            raise DataError(f"{path}: is missing; it must be a tokenizer.json of the tokenizers package")
        inner = read_inner(path)
        if eot_token is None:
            eot_token = configured_eot(path.with_name("tokenizer_config.json")) or END_OF_TEXT
        return cls(inner, origin=str(path), eot_token=eot_token, use_special_tokens=use_special_tokens)

    def special_id(self, name: str) -> int | None:
        """Id of a special token, if there is one of this name."""
        added = self._inner.get_added_tokens_decoder().items()
        return next((index for index, token in added if token.special and token.content == name), None)

    @property
    def dtype(self) -> str:
        return id_dtype(self.vocab_size)

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """With byte fallback, counts the space that such a vocabulary puts before a text."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._inner.get_vocab(with_added_tokens=False).items():
            if self.is_lossless:
                lengths[index] = len(token)  # the byte-level alphabet writes each byte as one character
            else:
                is_byte = len(token) == 6 and token.startswith("<0x")
                lengths[index] = 1 if is_byte else len(token.replace(SPACE, " ").encode())
        for index, added in self._inner.get_added_tokens_decoder().items():
            is_text = self._uses_special or not added.special
            lengths[index] = len(added.content.encode()) if is_text else 0
        lengths[self.eos_id] = 0
        return lengths

    def normalize(self, text: bytes) -> bytes:
        normalized = text.decode("utf-8", errors="replace").encode()
        return normalized if self.is_lossless else self.decode_bytes(self.encode(normalized))

    def encode(self, text: bytes) -> NDArray[Any]:
        string = text.decode("utf-8", errors="replace")
        # special tokens are recognized in all of a text or in none: only with them, end-of-text is cut out first
        parts = string.split(self._eot_token) if self._uses_special else [string]
        encoded = [self._encode(parts[0])]
        for part in parts[1:]:
            encoded += [self._eot_spelled, self._encode(part)]
        return np.concatenate(encoded)

    def _encode(self, text: str) -> NDArray[Any]:
        # "fast" omits character offsets, which take more memory than the text
        [encoding] = self._inner.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=self.dtype)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        text_ids = [int(index) for index in ids if index != self.eos_id]
        return self._inner.decode(text_ids, skip_special_tokens=not self._uses_special)

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        return self.decode(ids).encode()

    def save(self, folder: Path) -> dict[str, Any]:
        path = folder / TOKENIZER_FILE
        self._inner.save(str(path))
        return {
            "kind": "bpe",
            "file": path.name,
            "sha256": file_sha256(path),
            **({"eot_token": self._eot_token} if self._eot_token != END_OF_TEXT else {}),
            **({"use_special_tokens": True} if self._uses_special else {}),
        }


def byte_alphabet() -> list[str]:
    """The characters with which the package writes bytes, in no order."""
    alphabet: list[str] = tokenizers_package().pre_tokenizers.ByteLevel.alphabet()
    return alphabet


def bytes_to_text(content: bytes) -> str:
    """Bytes in the alphabet of byte-level BPE: printable characters of Latin-1 for themselves, others moved up."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = {byte: 0x100 + number for number, byte in enumerate(byte for byte in range(256) if byte not in kept)}
    return "".join(chr(moved.get(byte, byte)) for byte in content)


def configured_eot(path: Path) -> str | None:
    """eos_token of a tokenizer_config.json of transformers; None if it has none. Raises DataError."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text()).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: can't be read: {error!r}") from error
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise DataError(f"{path}: eos_token={token!r}: must be a string")
    return token


def read_inner(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json. Raises DataError if it is none."""
    try:
        return tokenizers_package().Tokenizer.from_file(str(path))
    except DataError:
        raise
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"{path}: is not a tokenizer.json of the tokenizers package ({error})") from error


def tokenizers_package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("BPE needs the package tokenizers: pip install 'reformer_dist[bpe]'") from error
    return tokenizers
