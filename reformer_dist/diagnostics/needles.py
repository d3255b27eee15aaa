"""Needles in a haystack: does a language model find a number hidden in text, at any length and depth?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from reformer_dist.data import Tokenizer
from reformer_dist.data.format.label_spans import token_spans
from reformer_dist.data.prepare.needles import ASKED_BYTES, hide_needles
from reformer_dist.errors import DataError, UserError
from reformer_dist.models import ReformerLM

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class NeedleCell:
    """Answers at one length and depth."""

    length: int
    """Bytes of text with the needle and the question."""
    depth: float
    """Place of the needle: 0 is the beginning of the text, 1 its end."""
    answers: float
    """Fraction of the numbers that the model would write in full, taking the most probable token at each step."""
    tokens: float
    """Fraction of the tokens of the numbers that are the most probable ones, each given those before it."""


@torch.no_grad()
def measure_needles(
    model: ReformerLM, tokenizer: Tokenizer, text: bytes, lengths: Sequence[int], n_samples: int, seed: int = 0
) -> list[NeedleCell]:
    """Asks for n_samples needles at each length and each of DEPTHS, hidden in random parts of a text.

    lengths: in bytes, above ASKED_BYTES. Raises DataError if the text is shorter than a length.
    """
    draw, device = np.random.default_rng(seed), next(model.parameters()).device
    cells = []
    for length in lengths:
        if length > len(text):
            raise DataError(f"--needles {length}: the held-out text is shorter, {len(text)} bytes")
        for depth in DEPTHS:
            right: list[np.ndarray] = []
            for _ in range(n_samples):
                start = int(draw.integers(0, len(text) - length + 1))
                needles = hide_needles(draw, text[start : start + length - ASKED_BYTES], [depth])
                ids = tokenizer.encode(needles.text)
                [[first, end]] = token_spans(needles.answers, ids, tokenizer, "needle")
                tokens = torch.tensor([[tokenizer.eos_id, *ids[:end].tolist()]], device=device)
                predicted = model(tokens[:, :-1], logits_to_keep=end - first).argmax(-1)
                right.append((predicted == tokens[:, first + 1 :]).cpu().numpy().ravel())
            answers = float(np.mean([row.all() for row in right]))
            cells.append(NeedleCell(length, depth, answers, float(np.concatenate(right).mean())))
    return cells


def needle_table(cells: Sequence[NeedleCell]) -> list[str]:
    """One line per length: the percentage of answers at each depth, and of their tokens over all depths."""
    depths = " ".join(f"{depth:>5.0%}" for depth in DEPTHS)
    lines = [f"  bytes | % of answers at depth {depths} | % of tokens"]
    for length in dict.fromkeys(cell.length for cell in cells):
        row = [cell for cell in cells if cell.length == length]
        percent = " ".join(f"{100 * cell.answers:>5.0f}" for cell in row)
        lines.append(f"{length:>7,} | {'':22}{percent} | {100 * np.mean([cell.tokens for cell in row]):.1f}")
    return lines


def plot_needles(cells: Sequence[NeedleCell], path: Path) -> None:
    """Writes a heat map of length x depth as a PNG. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which selects a display backend
    except ImportError as error:
        raise UserError(
            f"--plot {path}: matplotlib is not installed; pip install 'reformer_dist[sweep]'"
        ) from error
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    table = np.array([cell.answers for cell in cells]).reshape(len(lengths), len(DEPTHS)).T
    figure = Figure(figsize=(1.5 + len(lengths), 3.5), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * table, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
    axes.set_xlabel("bytes of text")
    axes.set_ylabel("depth of the needle")
    figure.colorbar(image, label="% of answers")
    figure.savefig(path, dpi=150)
