"""A decoder whose logits are a table lookup of the last tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class TableDecoder:
    """Logits after one token, or after two, are a row of the table."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        """[V, V] or, for the last two tokens, [V, V, V]."""
        self.rows_decoded: list[int] = []

    def prefill(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        self._tokens = tokens
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        self._tokens = torch.cat([self._tokens, tokens.unsqueeze(1)], dim=1)
        return self._logits()

    def select_rows(self, rows: Tensor) -> None:
        self._tokens = self._tokens[rows]

    def _logits(self) -> Tensor:
        self.rows_decoded.append(self._tokens.shape[0])
        if self.table.ndim == 2:
            return self.table[self._tokens[:, -1]]
        return self.table[self._tokens[:, -2], self._tokens[:, -1]]


def random_table(vocab_size: int, seed: int, order: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*[vocab_size] * order, generator=generator)
