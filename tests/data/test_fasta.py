"""FASTA as documents, and rows of DNA from the other strand."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reformer_dist.config import DataConfig, RunConfig, Strand, TaskConfig, TaskKind
from reformer_dist.data import (
    DNA,
    ByteTokenizer,
    Corpus,
    DrawKey,
    FastaOptions,
    RawSample,
    RowSelection,
    Span,
    document_ids,
    pack_spans,
    read_fasta,
    reverse_complement_row,
    reverse_documents,
    write_samples,
)
from reformer_dist.data.format.dna import COMPLEMENT, LETTERS, reverse_complement
from reformer_dist.data.prepare import fasta
from reformer_dist.errors import ConfigError, DataError
from reformer_dist.tasks import make_task

BASES = random.Random(0).choices(b"ACGT", k=5000)


def write_fasta(path: Path, sequences: dict[str, bytes], width: int = 60) -> Path:
    lines = []
    for name, bases in sequences.items():
        lines += [b">" + name.encode(), *(bases[i : i + width] for i in range(0, len(bases), width))]
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def documents(*paths: Path, beds: tuple[Path, ...] = (), **options: Any) -> dict[str, bytes]:
    return {sample.name: sample.fields[0] for sample in read_fasta(paths, beds, FastaOptions(**options))}


@pytest.mark.parametrize("suffix", [".fa", ".fasta.gz"])
def test_sequences_of_species(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folders, read in small blocks; a chromosome is in one split."""
    monkeypatch.setattr(fasta, "BLOCK_BYTES", 100)
    bases = bytes(BASES)
    write_fasta(tmp_path / f"mouse{suffix}", {"chr1 of a mouse": bases, "chr2": b"acgtn"})
    write_fasta(tmp_path / f"yeast{suffix}", {"chr1": b"RYSWKMBDHV"})
    expected = {"mouse/chr1:0-5000": bases, "mouse/chr2:0-5": b"ACGTN", "yeast/chr1:0-10": b"RYSWKMBDHV"}
    assert documents(tmp_path) == expected
    assert documents(*sorted(tmp_path.iterdir())) == expected
    assert documents(tmp_path, is_selected=lambda name: name == "mouse/chr2") == {"mouse/chr2:0-5": b"ACGTN"}
    sections = list(read_fasta([tmp_path], options=FastaOptions(section_bytes=1500)))
    assert [len(sample.fields[0]) for sample in sections][:3] == [1500, 1500, 2000]
    assert b"".join(sample.fields[0] for sample in sections[:3]) == bases
    assert {sample.split_key for sample in sections[:3]} == {b"mouse/chr1"}
    with pytest.raises(DataError, match="no sequence is selected"):
        documents(tmp_path, is_selected=lambda name: False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_n": 2}, {"0-4": b"ACGT", "7-13": b"ACNNGT"}),
        ({"max_n": 0}, {"0-4": b"ACGT", "7-9": b"AC", "11-13": b"GT"}),
        ({}, {"0-13": b"ACGTNNNACNNGT"}),
        ({"case": "keep", "max_n": 2}, {"0-4": b"ACgt", "7-13": b"acnNGT"}),
        ({"case": "mask", "max_n": 2}, {"0-2": b"AC", "11-13": b"GT"}),
    ],
)
def test_case_and_unknown_bases(
    tmp_path: Path, options: dict[str, Any], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (3, 5, 60):  # runs of N cross lines and blocks
        monkeypatch.setattr(fasta, "BLOCK_BYTES", width)
        path = write_fasta(tmp_path / "x.fa", {"c": b"ACgtNNNacnNGT"}, width)
        assert documents(path, **options) == {f"x/c:{place}": bases for place, bases in expected.items()}


@given(st.text("ACGN", max_size=200), st.integers(1, 40), st.integers(0, 3), st.integers(1, 50))
def test_pieces_do_not_depend_on_blocks(text: str, width: int, max_n: int, size: int) -> None:
    bases, options = text.encode(), FastaOptions(max_n=max_n, section_bytes=size)
    blocks = [bases[i : i + width] for i in range(0, len(bases), width)]
    pieces = list(fasta._cut(blocks, options))
    assert pieces == list(fasta._cut([bases], options))
    assert all(
        bases[start : start + len(piece)] == piece and b"N" * (max_n + 1) not in piece for start, piece in pieces
    )
    kept = {place for start, piece in pieces for place in range(start, start + len(piece))}
    lost = {place for place in range(len(bases)) if place not in kept}
    assert len(kept) == sum(len(piece) for _, piece in pieces)
    assert all(bases[place : place + 1] == b"N" for place in lost)


def test_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "BLOCK_BYTES", 100)
    bases, bed = bytes(BASES), tmp_path / "x.bed"
    path = write_fasta(tmp_path / "x.fa", {"a": bases, "b": bases[::-1], "c": b"A"})
    bed.write_text("track name=t\n#comment\na\t10\t300\tn\t0\t-\nb 0 5000\na 200 210 n 0 +\n\n")
    assert documents(path, beds=(bed,)) == {
        "x/a:200-210": bases[200:210],
        "x/a:10-300-": reverse_complement(bases[10:300]),
        "x/b:0-5000": bases[::-1],
    }
    for line, message in (
        ("a 10 5001", r"x\.bed:1: ends at 5001; x/a has 5000 bases"),
        ("z 10 50", r"x\.bed:1: names a sequence that .*x\.fa has not"),
        ("a 10", r"x\.bed:1: is 'a 10"),
        ("a 50 10", r"x\.bed:1: is"),
        ("a 1 2 n 0 x", r"x\.bed:1: strand 'x'"),
    ):
        bed.write_text(line)
        with pytest.raises(DataError, match=message):
            documents(path, beds=(bed,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ACGT\n", r"x\.fa:1: begins with b'ACGT"),
        (b"", r"x\.fa:1: begins"),
        (b">a\nACGT\nACXT\n", r"x\.fa:3: letter 'X'"),
        (b">a\nACGT\n>b\nA\n\nCU\n", r"x\.fa:6: letter 'U'.*T for U"),
        (b">a\nAC-T\n", r"x\.fa:2: letter '-'"),
        (b">a\nACGT\n>a\nAC\n", r"x\.fa: a sequence is named 'a'"),
        (b">\nACGT\n", r"x\.fa: a sequence is named ''"),
    ],
)
def test_bad_fasta_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.fa").write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "x.fa")
    with pytest.raises(DataError, match=r"x\.fa"):
        documents(tmp_path / "x.fa", tmp_path / "x.fa.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no FASTA file"):
        documents(tmp_path / "empty")


def test_the_other_strand_is_exact() -> None:
    assert sorted(COMPLEMENT) == list(range(256))
    assert reverse_complement(b"AACGTNryk") == b"mryNACGTT"
    assert reverse_complement(reverse_complement(LETTERS)) == LETTERS


@given(st.lists(st.sampled_from([*b"ACGTN", 256]), min_size=9, max_size=9), st.integers(0, 8), st.booleans())
def test_the_reverse_complement_of_the_reverse_complement_is_the_row(
    window: list[int], n_labels: int, mask: bool
) -> None:
    tokens = np.array(window[: n_labels + 1] + [256] * (8 - n_labels))
    labels = np.where(np.arange(8) < n_labels, tokens[1:], -100)
    if mask:
        labels[:n_labels][tokens[:n_labels] == 256] = -100
    other = reverse_complement_row((tokens, labels), n_labels, mask, 256)
    again = reverse_complement_row(other, n_labels, mask, 256)
    for found, expected in zip(again, (tokens, labels), strict=True):
        assert np.array_equal(found, expected) and found.dtype == expected.dtype
    text = bytes(token for token in window[1 : n_labels + 1] if token < 256)
    assert bytes(token for token in other[0][:n_labels].tolist() if token < 256) == reverse_complement(text)


def test_documents_of_the_other_strand() -> None:
    """Each base is in its own document, and so is the end-of-text that is predicted after it."""
    texts = [b"ACG", b"TT", b"GACCA"]
    spans = [Span(0, None, 0, len(text) + 1, np.array([*text, 256])) for text in texts]
    n_labels = sum(span.stop for span in spans)
    row, ids = pack_spans(spans, 20, 256, separate=True), document_ids(spans, 20)
    tokens, labels = reverse_complement_row(row, n_labels, False, 256)
    other = reverse_documents(ids, row[0], n_labels, 256)
    for number, text in enumerate(reversed(texts)):
        assert labels[other == number].tolist() == [*reverse_complement(text), 256]
        assert tokens[:-1][other == number].tolist() == [256, *reverse_complement(text)]
    assert set(other[n_labels:]) == {3} and set(labels[n_labels:]) == {-100}


def write_genome(folder: Path, alphabet: str | None = DNA) -> Corpus:
    samples = [RawSample(f"x/{n}", (bytes(BASES[n * 500 : n * 500 + 400]),)) for n in range(10)]
    write_samples(samples[1:], folder, ByteTokenizer(), heldout=samples[:1], alphabet=alphabet)
    return Corpus.open([folder])


def test_strands_of_rows(tmp_path: Path) -> None:
    """Of training and held-out rows; about half of random rows are reversed, the same ones each time."""
    corpus = write_genome(tmp_path / "data")

    def rows(strand: Strand) -> tuple[list[bytes], bytes]:
        config = RunConfig(data=DataConfig(path=str(tmp_path / "data"), seq_len=64, strand=strand))
        task = make_task(config, corpus.tokenizer, corpus.labels)
        task.check(corpus)
        tokens = np.array([*BASES[:400], 256])
        spans = [Span(0, None, start, start + 64, tokens) for start in range(0, 320, 64)] * 20
        examples = [task.make_example([span], DrawKey(0, 0, place)) for place, span in enumerate(spans)]
        if strand is not Strand.random:
            for example, span in zip(examples, spans, strict=True):
                row = pack_spans([span], 64, 256)
                expected = reverse_complement_row(row, 64, False, 256) if strand is Strand.reverse else row
                assert np.array_equal(example["labels"], expected[1])
        [batch] = list(task.heldout(corpus, RowSelection(micro_batch_size=7)))
        return [example["labels"].tobytes() for example in examples], batch["labels"].numpy().tobytes()

    forward, reverse, mixed = rows(Strand.forward), rows(Strand.reverse), rows(Strand.random)
    assert mixed == rows(Strand.random)
    assert forward[1] == mixed[1] != reverse[1]
    taken = [a == c for a, c in zip(forward[0], mixed[0], strict=True)]
    assert all(c in (a, b) for a, b, c in zip(forward[0], reverse[0], mixed[0], strict=True))
    assert 30 < sum(taken) < 70


def test_strands_are_refused_elsewhere(tmp_path: Path) -> None:
    corpus = write_genome(tmp_path / "data", alphabet=None)
    config = RunConfig(data=DataConfig(path=str(tmp_path / "data"), strand=Strand.random))
    with pytest.raises(DataError, match=r"data\.strand=random: .*--fasta"):
        make_task(config, corpus.tokenizer, corpus.labels).check(corpus)
    with pytest.raises(ConfigError, match=r"data\.strand=reverse: .*completion"):
        RunConfig(task=TaskConfig(kind=TaskKind.completion), data=DataConfig(strand=Strand.reverse))
