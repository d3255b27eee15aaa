"""Any tokenizer.json of Hugging Face that changes text: WordPiece, Unigram, or a BPE with a normalizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.tokenizer import BpeTokenizer, byte_alphabet
from reformer_dist.errors import DataError


class LossyTokenizer(BpeTokenizer):
    """A tokenizer whose text is what it decodes: in lower case, or with single spaces, as it normalizes.

    Bits per byte count the bytes of that text, and are comparable only between models with such a vocabulary.
    """

    def _check(self, origin: str) -> None:
        self.is_lossless = False
        if not len(self.encode(b"a text")):
            raise DataError(f"{origin}: encodes text as no token; it must have a vocabulary")

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """By what a token adds to a decoded text."""
        vocabulary = self._inner.get_vocab(with_added_tokens=False)
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        if set(byte_alphabet()) <= vocabulary.keys():
            for token, index in vocabulary.items():
                lengths[index] = len(token)
        else:
            first = int(self.encode(b"a")[0])
            indexes = sorted(vocabulary.values())
            texts = self._inner.decode_batch([[first, index] for index in indexes], skip_special_tokens=False)
            before = len(self._inner.decode([first], skip_special_tokens=False).encode())
            lengths[indexes] = [max(0, len(text.encode()) - before) for text in texts]
        for index, added in self._inner.get_added_tokens_decoder().items():
            is_text = self._uses_special or not added.special
            lengths[index] = len(added.content.encode()) if is_text else 0
        lengths[self.eos_id] = 0
        return lengths

    def encode(self, text: bytes) -> NDArray[Any]:
        """Never holds end-of-text, which is a piece of some models: its own text is cut in two."""
        eot = self._eot_token
        whole = text.decode("utf-8", errors="replace").replace(eot, f"{eot[:1]}\0{eot[1:]}")
        ids = np.concatenate([self._encode(part) for part in whole.split("\0")])
        return ids[ids != self.eos_id]  # another spelling of it may be normalized to it

    def normalize(self, text: bytes) -> bytes:
        return self.decode_bytes(self.encode(text))

    def save(self, folder: Path) -> dict[str, Any]:
        return {**super().save(folder), "kind": "lossy"}
