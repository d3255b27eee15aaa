"""DNA as bytes: the nucleotides and ambiguity codes of IUPAC, in upper or lower case, and the other strand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DNA = "dna"
"""Alphabet of a dataset, in its dataset.json."""
NUCLEOTIDES = b"ACGTNRYSWKMBDHV"
_COMPLEMENTS = b"TGCANYRSWMKVHDB"
LETTERS = NUCLEOTIDES + NUCLEOTIDES.lower()
COMPLEMENT = bytes.maketrans(LETTERS, _COMPLEMENTS + _COMPLEMENTS.lower())
"""Table for bytes.translate. It is its own inverse, since U, which pairs with A as T does, is no letter of DNA."""
_TABLE = np.frombuffer(COMPLEMENT, dtype=np.uint8)


def reverse_complement(sequence: bytes) -> bytes:
    """The other strand, read in its own direction."""
    return sequence.translate(COMPLEMENT)[::-1]


def reverse_complement_ids(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The other strand of byte-level token ids [n]; ids above 255, such as end-of-text, stay as they are."""
    is_byte = ids < len(_TABLE)
    return np.where(is_byte, _TABLE[np.where(is_byte, ids, 0)], ids)[::-1].copy()
