"""reformer-evaluate on a small trained run: checks of the data, and baselines of the text."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from support.tiny import WORDS, write_tiny_dataset

from reformer_dist.data import BpeTokenizer, ByteTokenizer, Corpus, RawSample, write_dataset, write_samples
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import UserError
from reformer_dist.evaluate import _heldout_text, _open, build_parser
from reformer_dist.run.pretrained import LoadedModel
from reformer_dist.tasks.text_metrics import order0_bits_per_byte


def opened(trained: Path, data: Path, job: Runtime) -> tuple[argparse.Namespace, LoadedModel, Corpus]:
    arguments = build_parser().parse_args([str(trained), f"data.path={data}"])
    return arguments, *_open(arguments, [], job)


def test_data_of_another_tokenizer_are_refused(trained: Path, tmp_path: Path, job: Runtime) -> None:
    """Also with the same vocabulary size but other ids, with which the loss would be meaningless."""
    other = BpeTokenizer.train([b"text"], 257)
    documents = [(f"{number}", f"{number} {' '.join(WORDS)}".encode()) for number in range(20)]
    write_dataset(documents, tmp_path / "other", other, heldout_fraction=0.3)
    right = r"other: .*tokenizer.*--tokenizer-of .*step-00000006"
    with pytest.raises(UserError, match=right):
        opened(trained, tmp_path / "other", job)
    _, _, corpus = opened(trained, write_tiny_dataset(tmp_path / "same"), job)
    assert corpus.total("samples", "heldout") > 0


def test_a_text_that_is_not_utf8_is_held_against_its_own_bytes(
    trained: Path, tmp_path: Path, job: Runtime
) -> None:
    """Replaced by U+FFFD, each byte would become the same three, which compress far better."""
    document = bytes(range(256)) * 2
    records = [RawSample("latin", (document,))]
    write_samples(records, tmp_path / "d", ByteTokenizer(), heldout=records)
    arguments, loaded, corpus = opened(trained, tmp_path / "d", job)
    # incomplete rows at the end have no labels
    text = _heldout_text(arguments, loaded, corpus)
    assert len(text) >= 256 and document.startswith(text)
    assert order0_bits_per_byte(text) > 7.9
