"""Needles are found by a model that looks them up, and only where it looks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from reformer_dist.data import ByteTokenizer
from reformer_dist.diagnostics.needles import DEPTHS, measure_needles, needle_table, plot_needles
from reformer_dist.errors import DataError

TEXT = b"".join(b"line %d of the text\n" % n for n in range(400))


class Lookup(nn.Module):
    """Answers with the number in the last `reach` bytes before the question, or with 0."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach, self.anchor = reach, nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, logits_to_keep: int) -> Tensor:
        text = bytes(tokens[0, 1:].tolist()).decode()
        asked = len(text) - logits_to_keep + 1  # the end of the question
        name = re.findall(r"The number of (\w+) is $", text[:asked])[0]
        seen = text[max(0, asked - 27 - self.reach) : asked - 27]  # before the question
        number = (re.findall(rf"The number of {name} is (\d+)\.", seen) or ["000000"])[0]
        return nn.functional.one_hot(torch.tensor([list(number.encode())]), 257).float()


def test_a_model_that_looks_everything_up() -> None:
    cells = measure_needles(Lookup(10_000), ByteTokenizer(), TEXT, [300, 1000], n_samples=3)
    assert [(cell.length, cell.depth) for cell in cells] == [(n, depth) for n in (300, 1000) for depth in DEPTHS]
    assert all(cell.answers == cell.tokens == 1 for cell in cells)
    lines = needle_table(cells)
    assert len(lines) == 3 and lines[2].split("|")[1].split() == ["100"] * 5


def test_a_model_that_looks_back_a_little() -> None:
    cells = measure_needles(Lookup(400), ByteTokenizer(), TEXT, [1000], n_samples=3)
    assert [cell.answers for cell in cells] == [0, 0, 0, 1, 1]
    assert all(0 < cell.tokens < 0.5 for cell in cells[:2])  # some digits are 0


def test_a_haystack_longer_than_the_text_is_refused() -> None:
    with pytest.raises(DataError, match=rf"--needles 100000: .* {len(TEXT)} bytes"):
        measure_needles(Lookup(1), ByteTokenizer(), TEXT, [100_000], 1)


def test_the_heat_map_is_a_picture(tmp_path: Path) -> None:
    cells = measure_needles(Lookup(400), ByteTokenizer(), TEXT, [300, 1000], n_samples=1)
    plot_needles(cells, tmp_path / "needles.png")
    assert (tmp_path / "needles.png").read_bytes().startswith(b"\x89PNG")
