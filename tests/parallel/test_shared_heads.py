"""Classification and question answering over sequences that ranks share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from head_cases import SEQ_LEN, run_tasks


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("seq_len", [SEQ_LEN, 3])  # some ranks hold no token of the shorter rows
def test_heads_over_slices_are_those_over_whole_sequences(
    run_on: Callable[..., None], heads: int, seq_len: int
) -> None:
    run_on(4, run_tasks, heads=heads, seq_len=seq_len)
