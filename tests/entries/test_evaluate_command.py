"""reformer-evaluate on a small trained run: which data it takes, and what it holds a text against."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import WORDS, write_tiny_dataset

from reformer_dist.data import BpeTokenizer, Corpus, write_dataset
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import UserError
from reformer_dist.evaluate import _open, build_parser


def opened(trained: Path, data: Path, job: Runtime) -> Corpus:
    arguments = build_parser().parse_args([str(trained), f"data.path={data}"])
    return _open(arguments, [], job)[1]


def test_data_of_another_tokenizer_are_refused(trained: Path, tmp_path: Path, job: Runtime) -> None:
    """Also of one with as many tokens: bytes in another order, by which a loss would mean nothing."""
    other = BpeTokenizer.train([b"text"], 257)
    documents = [(f"{number}", f"{number} {' '.join(WORDS)}".encode()) for number in range(20)]
    write_dataset(documents, tmp_path / "other", other, heldout_fraction=0.3)
    right = r"other: has another tokenizer than the model; .*--tokenizer-of .*step-00000006"
    with pytest.raises(UserError, match=right):
        opened(trained, tmp_path / "other", job)
    assert opened(trained, write_tiny_dataset(tmp_path / "same"), job).total("samples", "heldout") > 0
