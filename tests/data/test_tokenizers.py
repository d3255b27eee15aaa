"""Tokenizers preserve every text and know the bytes of every token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# tokenizer.json files as published models have them


def save_changed(folder: Path, change: Callable[[Any], None]) -> Path:
    """A trained tokenizer.json with a change. Without an end-of-text token, if the change removes it."""
    BpeTokenizer.train(TEXTS, 300).save(folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def as_llama_3(document: Any) -> None:
    renamed = {"<|endoftext|>": "<|end_of_text|>"}
    document["model"]["vocab"] = {renamed.get(key, key): n for key, n in document["model"]["vocab"].items()}
    [token] = document["added_tokens"]
    token["content"] = renamed[token["content"]]
    document["added_tokens"].append(token | {"id": 300, "content": "<|start_header_id|>"})


def byte_fallback(folder: Path, prefix: bool = True) -> Path:
    """As in Llama 2: spaces are U+2581, and rare characters are tokens of bytes."""
    package = pytest.importorskip("tokenizers")
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"\u2581thecaso",
        "\u2581t",
        "he",
    ]
    vocabulary = {name: index for index, name in enumerate(names)}
    inner = package.Tokenizer(
        package.models.BPE(vocabulary, [("\u2581", "t"), ("h", "e")], unk_token="<unk>", byte_fallback=True)
    )
    inner.add_special_tokens(names[:3])
    replace, start = package.normalizers.Replace(" ", "\u2581"), [package.normalizers.Prepend("\u2581")]
    inner.normalizer = package.normalizers.Sequence([*(start if prefix else []), replace])
    decoders = package.decoders
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    inner.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_space_before_each_document_is_refused(tmp_path: Path) -> None:
    """In silence, a space was added to each document that began without one."""

    def with_prefix(document: Any) -> None:
        document["pre_tokenizer"]["add_prefix_space"] = True

    with pytest.raises(DataError, match=r"tokenizer\.json: .*space.*add_prefix_space"):
        BpeTokenizer.load(save_changed(tmp_path, with_prefix))


@pytest.mark.parametrize("stripped", ["lstrip", "rstrip"])
def test_added_tokens_that_take_spaces_are_refused(tmp_path: Path, stripped: str) -> None:
    def with_token(document: Any) -> None:
        [eot] = document["added_tokens"]
        document["added_tokens"].append(eot | {"id": 300, "content": "<sep>", "special": False, stripped: True})

    with pytest.raises(DataError, match=r"changes text: .*<sep>"):
        BpeTokenizer.load(save_changed(tmp_path, with_token))


def test_random_merges_are_refused(tmp_path: Path) -> None:
    def with_dropout(document: Any) -> None:
        document["model"]["dropout"] = 0.5

    with pytest.raises(DataError, match=r"model\.dropout=0\.5"):
        BpeTokenizer.load(save_changed(tmp_path, with_dropout))


@pytest.mark.parametrize(
    "config", [None, {"eos_token": "<|end_of_text|>"}, {"eos_token": {"content": "</s>"}}, {}]
)
def test_the_token_that_ends_documents(tmp_path: Path, config: dict[str, Any] | None) -> None:
    path = save_changed(tmp_path, as_llama_3)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if config == {"eos_token": "<|end_of_text|>"}:
        assert BpeTokenizer.load(path).eos_id == 0
    else:
        missing = "</s>" if config else "<|endoftext|>"
        with pytest.raises(DataError, match=re.escape(missing) + r".*<\|end_of_text\|>.*--eot-token.*eos_token"):
            BpeTokenizer.load(path)
    chosen = BpeTokenizer.load(path, "<|start_header_id|>")
    assert (chosen.eos_id, chosen.vocab_size) == (300, 301)
    (tmp_path / "copy").mkdir()
    loaded = load_tokenizer(chosen.save(tmp_path / "copy"), tmp_path / "copy")
    assert loaded.eos_id == 300
    assert 300 not in loaded.encode(b"a <|start_header_id|>\n")


def test_text_that_spells_special_tokens(tmp_path: Path) -> None:
    path = save_changed(tmp_path, as_llama_3)
    text = "<|start_header_id|>the cat<|end_of_text|>, <|start_header_id|>"
    plain = BpeTokenizer.load(path, "<|end_of_text|>")
    assert {0, 300}.isdisjoint(plain.encode(text.encode()).tolist())
    used = BpeTokenizer.load(path, "<|end_of_text|>", use_special_tokens=True)
    (tmp_path / "copy").mkdir()
    specification = used.save(tmp_path / "copy")
    for tokenizer in (used, load_tokenizer(specification, tmp_path / "copy")):
        ids = tokenizer.encode(text.encode())
        assert ids.tolist().count(300) == 2 and ids[0] == ids[-1] == 300 and 0 not in ids
        assert tokenizer.decode([*ids, 0]) == text
        assert tokenizer.token_bytes[ids].sum() == len(text)
    assert specification != plain.save(tmp_path / "copy")


@pytest.mark.parametrize("prefix", [True, False])
@given(text=st.text())
@settings(deadline=None, max_examples=40)
def test_byte_fallback(tmp_path_factory: pytest.TempPathFactory, prefix: bool, text: str) -> None:
    folder = tmp_path_factory.mktemp("fallback")
    tokenizer = BpeTokenizer.load(byte_fallback(folder, prefix), "</s>")
    assert not tokenizer.is_lossless and tokenizer.eos_id == 2
    text += "</s> \U0001f600 the cat"
    expected = text.replace("\u2581", " ")
    ids = tokenizer.encode(text.encode())
    assert tokenizer.eos_id not in ids and tokenizer.decode([*ids, 2]) == expected
    assert tokenizer.normalize(text.encode()) == expected.encode()
    assert tokenizer.token_bytes[ids].sum() == len(expected.encode()) + prefix


def test_byte_fallback_without_all_bytes_is_refused(tmp_path: Path) -> None:
    path = byte_fallback(tmp_path)
    document = json.loads(path.read_text())
    del document["model"]["vocab"]["<0xFE>"]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="256 bytes"):
        BpeTokenizer.load(path, "</s>")
