"""Small datasets in real tar shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.datasets import varied_documents

from reformer_dist.data import ByteTokenizer, Dataset, write_dataset


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    """Writes (name, text) documents, by default `varied_documents`, in shards of a few documents each."""

    def make(documents: Sequence[tuple[str, bytes]] | None = None, **changed: Any) -> Dataset:
        folder: Path = tmp_path_factory.mktemp("dataset")
        settings = {"tokenizer": ByteTokenizer(), "shard_bytes": 12_000, "heldout_fraction": 0.2} | changed
        write_dataset(varied_documents() if documents is None else documents, folder, **settings)
        return Dataset.open(folder)

    return make


@pytest.fixture(scope="session")
def dataset(make_dataset: Callable[..., Dataset]) -> Dataset:
    """60 documents in several shards; not to be changed."""
    return make_dataset()
