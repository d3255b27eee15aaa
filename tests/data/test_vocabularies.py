"""Vocabularies of other programs: any tokenizer.json, ranks of tiktoken, SentencePiece; special tokens by name."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support.datasets import varied_documents
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from reformer_dist.data import BpeTokenizer, Tokenizer, load_tokenizer, open_vocabulary, write_dataset
from reformer_dist.data.format.lossy_tokenizer import LossyTokenizer
from reformer_dist.data.format.tiktoken import SPLIT_PATTERNS
from reformer_dist.data.format.tokenizer import bytes_to_text
from reformer_dist.errors import DataError

TEXTS = [
    "Hello world, it's me",
    "  two  spaces\n\n\ttab 12345",
    "Über ｆｕｌｌ 中文 🙂",
    "def f(x):\n    return x",
]
EOT = "<|endoftext|>"


def save(inner: Any, path: Path) -> Path:
    inner.save(str(path))
    return path


def train(model: Any, trainer: Any, **parts: Any) -> Any:
    inner = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.train_from_iterator(TEXTS * 5, trainer)
    return inner


def word_piece() -> Any:
    special = ["[UNK]", "[SEP]"]
    return train(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def unigram() -> Any:
    return train(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["[UNK]", "[SEP]"], unk_token="[UNK]", show_progress=False
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def composing_bpe() -> Any:
    return train(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["[SEP]"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True),
        decoder=decoders.ByteLevel(),
    )


@pytest.mark.parametrize("make", [word_piece, unigram, composing_bpe])
def test_any_tokenizer_of_hugging_face(tmp_path: Path, make: Any) -> None:
    """It changes text, and says so; its bytes are those of what it decodes."""
    path = save(make(), tmp_path / "tokenizer.json")
    tokenizer = open_vocabulary(path, "[SEP]")
    assert isinstance(tokenizer, LossyTokenizer) and not tokenizer.is_lossless
    inner = tokenizers.Tokenizer.from_file(str(path))
    for text in [*TEXTS, "[SEP] inside", "［SEP］"]:
        ids = tokenizer.encode(text.encode())
        if "SEP" not in text:
            assert ids.tolist() == inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.eos_id not in ids
        normalized = tokenizer.normalize(text.encode())
        assert normalized == tokenizer.decode(ids).encode()
        assert abs(int(tokenizer.token_bytes[ids].sum()) - len(normalized)) <= 3
    again = load_tokenizer(tokenizer.save(tmp_path), tmp_path)
    assert again.encode(b"some text").tolist() == tokenizer.encode(b"some text").tolist()
    summary = write_dataset(varied_documents(), tmp_path / "data", tokenizer, heldout_fraction=0.2)
    assert summary.total("samples") == 60
    for eot, message in (
        (None, r"no token <\|endoftext\|>.*--eot-token"),
        ("[END]", r"no token \[END\]"),
    ):
        with pytest.raises(DataError, match=message):
            open_vocabulary(path, eot)
    assert open_vocabulary(path, "[END]", special_tokens=["[END]"]).vocab_size == tokenizer.vocab_size + 1


def write_ranks(path: Path, tokenizer: BpeTokenizer) -> dict[bytes, int]:
    """Ranks with the merges of a BPE: bytes first, then its other tokens in the order in which it learned them."""
    of_text = {bytes_to_text(bytes([byte])): bytes([byte]) for byte in range(256)}
    vocabulary = tokenizer._inner.get_vocab(with_added_tokens=False)
    tokens = [
        b"".join(of_text[letter] for letter in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)
    ]
    tokens = [bytes([byte]) for byte in range(256)] + [
        token for token in tokens if 1 < len(token) < 30 and token != EOT.encode()
    ]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_ranks_of_tiktoken(tmp_path: Path, name: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    source = Path(pytest.__file__).read_text() + Path(tokenizers.__file__).read_text() + "\n".join(TEXTS)
    path = tmp_path / f"{name}.tiktoken"
    ranks = write_ranks(path, BpeTokenizer.train([source.encode()], 700))
    expected = tiktoken.Encoding(name, pat_str=SPLIT_PATTERNS[name], mergeable_ranks=ranks, special_tokens={})
    tokenizer = open_vocabulary(path, special_tokens=["<|fim_middle|>"])
    assert tokenizer.is_lossless and tokenizer.eos_id == len(ranks) and tokenizer.vocab_size == len(ranks) + 2
    for text in [*TEXTS, source, "a \r\n\n b\n", "'LL don't 1234567 x2 CamelCase"]:
        assert tokenizer.encode(text.encode()).tolist() == expected.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text.encode())) == text
    spec = tokenizer.save(tmp_path)
    assert load_tokenizer(spec, tmp_path).encode(source.encode()).tolist() == expected.encode_ordinary(source)


def test_bad_vocabularies_are_named(tmp_path: Path) -> None:
    ranks = tmp_path / "mine.tiktoken"
    write_ranks(ranks, BpeTokenizer.train([b"text"], 260))
    with pytest.raises(DataError, match=r"mine\.tiktoken: does not say how.*--split-regex: gpt2"):
        open_vocabulary(ranks)
    with pytest.raises(DataError, match=r"--split-regex \(: is not a regular expression"):
        open_vocabulary(ranks, split="(")
    assert open_vocabulary(ranks, split=r"\w+|\W+").encode(b"text")[0]
    lines = ranks.read_bytes().splitlines()
    for change, message in (
        ([*lines[:5], b"no base64"], r"mine\.tiktoken:6: is b'no base64'"),
        (lines[1:], "ranks must be 0 to"),
        ([*lines, b"AA== 999"], r"mine\.tiktoken:\d+: token .*two ranks"),
    ):
        ranks.write_bytes(b"\n".join(change))
        with pytest.raises(DataError, match=message):
            open_vocabulary(ranks, split="gpt2")
    json_file = save(word_piece(), tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"--split-regex gpt2: .*tokenizer\.json says itself"):
        open_vocabulary(json_file, "[SEP]", split="gpt2")
    for name, content in (("other.json", b"{}"), ("torn.json", b"{"), ("other.model", b"nothing")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: is not a "):
            open_vocabulary(tmp_path / name)
    with pytest.raises(DataError, match=r"lost\.json: is missing"):
        open_vocabulary(tmp_path / "lost.json")


def test_sentencepiece(tmp_path: Path) -> None:
    package = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS * 9))
    options = {"vocab_size": 80, "hard_vocab_limit": False, "minloglevel": 2, "control_symbols": ["<end>"]}
    for name, more in (("with", {}), ("without", {"eos_id": -1})):
        package.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / name), **options, **more)
    tokenizer: Tokenizer = open_vocabulary(tmp_path / "with.model")
    assert tokenizer.decode(tokenizer.encode(b"Hello world")) == "Hello world"
    with pytest.raises(DataError, match=r"without\.model: has no piece that ends a text"):
        open_vocabulary(tmp_path / "without.model")
    with pytest.raises(DataError, match=r"--eot-token <nope>: .*control symbols: <s>, <end>"):
        open_vocabulary(tmp_path / "without.model", "<nope>")
    ended = open_vocabulary(tmp_path / "without.model", "<end>")
    assert load_tokenizer(ended.save(tmp_path / "."), tmp_path).eos_id == ended.eos_id
    with pytest.raises(DataError, match=r"with\.model: SentencePiece has control symbols"):
        open_vocabulary(tmp_path / "with.model", special_tokens=["<x>"])


def test_special_tokens_of_a_new_vocabulary() -> None:
    tokenizer = BpeTokenizer.train([b"some text " * 9], 270, ["<|a|>", "<|b|>"])
    assert tokenizer._inner.token_to_id("<|b|>") == 2 and tokenizer.token_bytes[:3].tolist() == [0, 0, 0]
    assert 2 not in tokenizer.encode(b"<|b|>")
