"""Tokenizers preserve every text and know the bytes of every token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reformer_dist.data import BpeTokenizer, ByteTokenizer, load_tokenizer
from reformer_dist.errors import DataError

TEXTS = [b"the cat sat on the mat, the cat sat", "naïve café — 中文 🙂".encode(), b"def f(x):\n    return x\n"] * 5


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(TEXTS, vocab_size=300)


@given(st.binary())
def test_bytes_are_preserved(text: bytes) -> None:
    for tokenizer in (ByteTokenizer(), ByteTokenizer(2, 1)):
        assert tokenizer.decode_bytes([*tokenizer.encode(text), tokenizer.eos_id]) == text
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.astype(np.uint8).tobytes() == text
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id]) == text.decode("utf-8", errors="replace")
    assert tokenizer.token_bytes[ids].sum() == len(text)


@given(st.text(), st.booleans())
@settings(deadline=None)
def test_bpe_keeps_any_text(bpe: BpeTokenizer, text: str, spells_eos: bool) -> None:
    text += "<|endoftext|>\r\n" if spells_eos else ""
    ids = bpe.encode(text.encode())
    assert bpe.eos_id not in ids
    assert bpe.decode([*ids.tolist(), bpe.eos_id]) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode())


@given(st.binary())
@settings(deadline=None)
def test_bpe_replaces_what_is_not_utf8(bpe: BpeTokenizer, text: bytes) -> None:
    normalized = bpe.normalize(text)
    assert bpe.decode(bpe.encode(text)) == text.decode("utf-8", errors="replace")
    assert bpe.token_bytes[bpe.encode(text)].sum() == len(normalized)


def test_bpe_learns_merges(bpe: BpeTokenizer) -> None:
    assert bpe.vocab_size == 300
    assert bpe.dtype == "uint16"
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_saved_tokenizer_loads(tmp_path: Path, bpe: BpeTokenizer, kind: str) -> None:
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    loaded = load_tokenizer(tokenizer.save(tmp_path), tmp_path)
    for text in TEXTS:
        assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert (loaded.token_bytes == tokenizer.token_bytes).all()


def test_another_tokenizer_file_is_refused(tmp_path: Path, bpe: BpeTokenizer) -> None:
    spec = bpe.save(tmp_path)
    BpeTokenizer.train([b"quite different words"], 270).save(tmp_path)
    with pytest.raises(DataError, match="sha256"):
        load_tokenizer(spec, tmp_path)


def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    BpeTokenizer.train(TEXTS, 300).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.save(str(path))
    with pytest.raises(DataError, match=r"tokenizer\.json: .*text"):
        BpeTokenizer.load(path)


def test_a_tokenizer_without_all_bytes_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=50, special_tokens=["<|endoftext|>"], show_progress=False)
    inner.train_from_iterator(["a b c"], trainer=trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json: .*byte-level"):
        BpeTokenizer.load(tmp_path / "tokenizer.json")


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=256"):
        BpeTokenizer.train(TEXTS, 256)
    with pytest.raises(DataError, match=r"none\.json: .*missing"):
        BpeTokenizer.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json"):
        BpeTokenizer.load(tmp_path / "broken.json")
    with pytest.raises(DataError, match="kind 'words'"):
        load_tokenizer({"kind": "words"}, tmp_path)
    with pytest.raises(DataError, match=r"\.\./tokenizer\.json"):
        load_tokenizer({"kind": "bpe", "file": "../tokenizer.json"}, tmp_path)
