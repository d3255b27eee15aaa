"""Windows of a limited context count every label once, with at least half a window before it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from reformer_dist.data import IGNORE_INDEX
from reformer_dist.diagnostics.context_windows import cut_rows


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 3), st.integers(1, 4))
def test_every_label_counts_once(context: int, n_tokens: int, n_rows: int, micro_batch: int) -> None:
    tokens = torch.arange(n_rows * n_tokens).view(n_rows, n_tokens)  # a token is its place
    batches = list(cut_rows([{"tokens": tokens, "labels": tokens + 1000}], context, micro_batch))
    counted = []
    for batch in batches:
        assert 1 <= len(batch["tokens"]) <= micro_batch
        for row, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
            assert len(row) == min(context, n_tokens) and row == list(range(row[0], row[0] + len(row)))
            for i, label in enumerate(labels):
                if label != IGNORE_INDEX:
                    assert label == row[i] + 1000
                    assert i >= min(context // 2, row[i] % n_tokens)
                    counted.append(row[i])
    assert sorted(counted) == list(range(n_rows * n_tokens))


def test_the_full_context_is_the_row() -> None:
    rows = {"tokens": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    [batch] = cut_rows([rows], 6, 4)
    assert all(torch.equal(batch[name], rows[name]) for name in rows)
