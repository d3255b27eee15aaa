"""A row's loss and prediction depend neither on other rows of its batch nor on padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from task_data import WORDS, make, write_for, write_pairs

from reformer_dist.data import Corpus, RowSelection

CASES = {
    "completion": ["data.seq_len=128"],
    "sequence_classification": ["model.causal=false"],
    "question_answering": ["model.causal=false", "task.stride=8"],
    "sequence_to_sequence": ["task.max_source_len=64", "model.layers=[lsh,exact]"],
}


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(CASES))
def test_losses_of_rows_add_up(kind: str, tmp_path: Path) -> None:
    write = write_pairs if kind in ("completion", "sequence_to_sequence") else lambda path: write_for(kind, path)
    corpus = Corpus.open([write(tmp_path / "data")])
    task = make(kind, tmp_path / "data", *CASES[kind], labels=tuple(WORDS))
    model = task.build_model().eval()
    together = list(task.heldout(corpus, RowSelection(6, 6)))
    alone = list(task.heldout(corpus, RowSelection(6, 1)))
    assert (len(together), len(alone)) == (1, 6)
    lengths = {batch["tokens"].shape[1] for batch in alone}
    assert max(lengths) <= together[0]["tokens"].shape[1]
    assert len(lengths) > 1 or kind == "question_answering"
    losses = torch.stack([model(**batch) for batch in alone])
    assert torch.allclose(model(**together[0]), losses.sum(), rtol=1e-5)
    # padding rows have no labels
    [more] = task.heldout(corpus, RowSelection(6, 9))
    assert (more["labels"][6:] == -100).all()
    assert torch.allclose(model(**more), losses.sum(), rtol=1e-5)
