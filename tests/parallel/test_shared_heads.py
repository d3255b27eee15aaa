"""Classification and question answering over sequences that ranks share."""

from __future__ import annotations

from pathlib import Path

from support.launch import run_ranks


def test_heads_over_slices_are_those_over_whole_sequences() -> None:
    run_ranks(Path(__file__).with_name("head_cases.py"), 4, [])
