"""Fill-in-the-middle: texts reordered as prefix, suffix and middle, so that a causal model learns to fill gaps.

Whether and where a text is cut is a function of the text. Source: Bavarian et al., 2022 (arXiv 2207.14255).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.tokenizer import BpeTokenizer, Tokenizer
from reformer_dist.errors import DataError

FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@dataclass(frozen=True)
class FillInMiddle:
    """The fraction of texts that are reordered, and the special tokens before their parts."""

    rate: float
    tokens: tuple[str, str, str] = FIM_TOKENS
    """Before prefix, suffix and middle, in the order in which they are written."""

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the tokens. Raises DataError if the tokenizer lacks one of them."""
        ids = [tokenizer.special_id(name) if isinstance(tokenizer, BpeTokenizer) else None for name in self.tokens]
        missing = [name for name, index in zip(self.tokens, ids, strict=True) if index is None]
        if missing:
            hint = "name those of the vocabulary by --fim-tokens, or add them by --add-special-token"
            raise DataError(
                f"--fim {self.rate:g}: the tokenizer has no special token {', '.join(missing)}; {hint}"
            )
        return [index for index in ids if index is not None]

    def encode(self, parts: Sequence[bytes], tokenizer: Tokenizer) -> NDArray[Any]:
        """Token ids of the parts of a text, such as files, each of which may be reordered."""
        ids = self.token_ids(tokenizer)
        encoded: list[NDArray[Any]] = []
        for part in parts:
            pieces = self.cut(part)
            if pieces is None:
                encoded.append(tokenizer.encode(part))
                continue
            for index, piece in zip(ids, pieces, strict=True):
                encoded += [np.array([index], dtype=tokenizer.dtype), tokenizer.encode(piece)]
        return np.concatenate(encoded)

    def cut(self, text: bytes) -> tuple[bytes, bytes, bytes] | None:
        """(prefix, suffix, middle) of a text at random characters; None if it is left as it is."""
        digest = hashlib.blake2b(text, digest_size=24, person=b"middle").digest()
        draw, *places = (int.from_bytes(digest[i : i + 8], "big") / 2.0**64 for i in (0, 8, 16))
        if draw >= self.rate or len(text) < 2:
            return None
        start, stop = sorted(_character_start(text, int(place * (len(text) + 1))) for place in places)
        return text[:start], text[stop:], text[start:stop]


def _character_start(text: bytes, place: int) -> int:
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    return place
