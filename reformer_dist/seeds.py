"""Seeds as pure functions of their purpose, independent of global random state."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Derives a 63-bit seed from names and numbers, such as ("rotations", seed, layer, step)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
