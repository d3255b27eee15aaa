"""Attention over a sequence on several ranks, against the same on one: outputs and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launch import run_ranks

SCRIPT = Path(__file__).with_name("attention_cases.py")


@pytest.mark.parametrize(
    ("world_size", "meshes"),
    [
        (2, ["1x2", "2x1"]),
        pytest.param(3, ["1x3"], marks=pytest.mark.slow),
        (4, ["1x4", "2x2"]),
        pytest.param(4, ["4x1"], marks=pytest.mark.slow),
        pytest.param(8, ["1x8", "2x4"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_slices_are_the_whole(world_size: int, meshes: list[str]) -> None:
    assert "cases hold" in run_ranks(SCRIPT, world_size, meshes, timeout=500)
