"""Models under torch's FSDP2: gradients equal those of one process, or an error names what to shard."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fsdp_cases import cast_streams_are_refused, gradients_are_those_of_one_process, sublayers_are_refused


@pytest.mark.parametrize(
    ("recompute", "sharded"),
    [("reversible", "Block"), ("checkpoint", "Block"), ("checkpoint", "LSHSelfAttention"), ("none", "Block")],
)
def test_gradients(run_on: Callable[..., None], recompute: str, sharded: str) -> None:
    run_on(2, gradients_are_those_of_one_process, recompute=recompute, sharded=sharded)


def test_sharded_sublayers(run_on: Callable[..., None]) -> None:
    run_on(2, sublayers_are_refused)


def test_streams_in_half_precision(run_on: Callable[..., None]) -> None:
    run_on(2, cast_streams_are_refused)
