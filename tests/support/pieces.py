"""A small SentencePiece vocabulary, for tests of what it does to texts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from reformer_dist.data.format.sentencepiece import SentencePieceTokenizer


def train_pieces(folder: Path, sentences: list[str]) -> SentencePieceTokenizer:
    """A vocabulary of pieces and of all bytes; the test is skipped where the package is not installed."""
    package, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=305,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)
