"""SentencePiece vocabularies of converted models. They normalize text, so they are not lossless."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.dataset_layout import id_dtype
from reformer_dist.errors import DataError
from reformer_dist.fs.atomic import file_sha256

SPIECE_FILE = "spiece.model"
SPACE = "\u2581"  # a space within a piece


class SentencePieceTokenizer:
    """A `spiece.model`, read by the package sentencepiece; end-of-text is `</s>` or another control symbol."""

    is_lossless = False

    def __init__(self, path: Path, vocab_size: int | None = None, eot_token: str | None = None) -> None:
        """vocab_size: of the model, if larger than the number of pieces. eot_token: a control symbol.

        Raises DataError.
        """
        if not path.is_file():
            raise DataError(f"{path}: is missing; it must be a model of SentencePiece")
        package = _package()
        try:
            self._processor = package.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: is not a model of SentencePiece ({error})") from error
        self._path, n_pieces = path, len(self._processor)
        self.vocab_size = n_pieces if vocab_size is None else vocab_size
        if self.vocab_size < n_pieces:
            raise DataError(f"{path}: has {n_pieces} pieces, more than the {self.vocab_size} tokens of the model")
        self._eot_token = eot_token
        self.eos_id: int = self._processor.eos_id() if eot_token is None else self._control_id(eot_token)
        if self.eos_id < 0:
            raise DataError(f"{path}: has no piece that ends a text; it must have one to end documents with")

    def _control_id(self, name: str) -> int:
        index = int(self._processor.piece_to_id(name))
        if not self._processor.is_control(index):
            known = [each for each in range(len(self._processor)) if self._processor.is_control(each)]
            names = ", ".join(map(self._processor.id_to_piece, known)) or "none"
            raise DataError(f"{self._path}: --eot-token {name}: must be one of its control symbols: {names}")
        return index

    @property
    def dtype(self) -> str:
        return id_dtype(self.vocab_size)

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """Counts the space that SentencePiece prepends to a text."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for index in range(len(self._processor)):
            if self._processor.is_byte(index):
                lengths[index] = 1
            elif self._processor.is_unknown(index):
                lengths[index] = len(self._processor.decode([index]).encode())
            elif not self._processor.is_control(index):
                lengths[index] = len(self._processor.id_to_piece(index).replace(SPACE, " ").encode())
        return lengths

    def normalize(self, text: bytes) -> bytes:
        """The text as SentencePiece normalizes it, with U+2047 for unknown pieces."""
        return self.decode(self.encode(text)).encode()

    def encode(self, text: bytes) -> NDArray[Any]:
        return np.array(self._processor.encode(text.decode("utf-8", errors="replace")), dtype=self.dtype)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        known = [int(index) for index in ids if int(index) < len(self._processor)]
        return str(self._processor.decode(known))

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        return self.decode(ids).encode()

    def save(self, folder: Path) -> dict[str, Any]:
        path = folder / SPIECE_FILE
        path.write_bytes(self._path.read_bytes())
        return {
            "kind": "sentencepiece",
            "file": SPIECE_FILE,
            "sha256": file_sha256(path),
            "vocab_size": self.vocab_size,
            **({"eot_token": self._eot_token} if self._eot_token else {}),
        }


def _package() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        hint = "pip install 'reformer_dist[sentencepiece]'"
        raise DataError(f"a SentencePiece vocabulary needs the package sentencepiece: {hint}") from error
    return sentencepiece
