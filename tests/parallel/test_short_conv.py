"""Short convolutions cross the borders of slices, but not those of documents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conv_cases import run_convolutions


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("seq_len", [45, 7])  # the slices of the shorter rows are shorter than the convolution
@pytest.mark.parametrize("shared_qk", [True, False])
def test_convolutions_over_slices_are_those_over_whole_sequences(
    run_on: Callable[..., None], heads: int, seq_len: int, shared_qk: bool
) -> None:
    run_on(4, run_convolutions, heads=heads, seq_len=seq_len, shared_qk=shared_qk)
