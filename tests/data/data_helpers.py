"""Texts and shards for the tests of this folder."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path


def numbered_text(number: int, length: int) -> bytes:
    """A text whose parts can be told from those of any other number."""
    return b"".join(b"%d:%d " % (number, place) for place in range(length))[:length]


def varied_documents(n_documents: int = 60) -> list[tuple[str, bytes]]:
    """Lengths from 5 bytes to several thousand, most of them short."""
    lengths = [5 + (number * 37) % 90 + (3000 if number % 11 == 0 else 0) for number in range(n_documents)]
    return [(f"doc{number}", numbered_text(number, length)) for number, length in enumerate(lengths)]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def replace_split(folder: Path, split: str, texts: list[bytes]) -> None:
    """Put one shard of byte-level texts, empty ones included, in the place of a split."""
    path = folder / f"{split}-000000.tar"
    write_tar(path, [(f"{number}.txt", text) for number, text in enumerate(texts)])
    n_bytes = sum(map(len, texts))
    record = json.loads((folder / "dataset.json").read_text())
    shard = {"name": path.name, "size": path.stat().st_size, "sha256": "", "samples": len(texts)}
    record["splits"][split] = [shard | {"tokens": n_bytes + len(texts), "text_bytes": n_bytes}]
    (folder / "dataset.json").write_text(json.dumps(record))
