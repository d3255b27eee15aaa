"""What a text costs without a model: the marks that a trained one must beat."""

from __future__ import annotations

import gzip

import numpy as np


def order0_bits_per_byte(text: bytes) -> float:
    """Entropy of the text's own byte frequencies."""
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    shares = counts[counts > 0] / max(1, len(text))
    return float(-(shares * np.log2(shares)).sum())


def gzip_bits_per_byte(text: bytes) -> float:
    """Size under gzip's best compression."""
    return 8 * len(gzip.compress(text, compresslevel=9)) / max(1, len(text))
