"""Sequences that are token ids already: synthetic tasks, codes of audio or music, ids of another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.dataset_layout import id_dtype
from reformer_dist.errors import DataError


class IdTokenizer:
    """Ids 0 .. n_ids - 1, with end-of-text as n_ids. Their text is decimal numbers, separated by spaces."""

    is_lossless = False

    def __init__(self, n_ids: int) -> None:
        if n_ids < 1:
            raise DataError(f"n_ids={n_ids}: must be at least 1")
        self.eos_id = n_ids
        self.vocab_size = n_ids + 1
        self.dtype = id_dtype(self.vocab_size)

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        return np.zeros(self.vocab_size, dtype=np.int64)  # ids have no text to count the bytes of

    def normalize(self, text: bytes) -> bytes:
        return b" ".join(text.split())

    def encode(self, text: bytes) -> NDArray[Any]:
        """Raises DataError if the text is not ids below n_ids."""
        numbers = text.split()
        wrong = next((word for word in numbers if not word.isdigit() or int(word) >= self.eos_id), None)
        if wrong is not None:
            raise DataError(
                f"token id {wrong.decode(errors='replace')!r}: must be an integer from 0 to {self.eos_id - 1}"
            )
        return np.array([int(word) for word in numbers], dtype=self.dtype)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        return " ".join(str(int(index)) for index in ids if index != self.eos_id)

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        return self.decode(ids).encode()

    def save(self, folder: Path) -> dict[str, Any]:
        return {"kind": "ids", "n_ids": self.eos_id}
