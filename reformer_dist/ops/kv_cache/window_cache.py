"""KV cache of sliding-window attention: a ring buffer of the last `window` keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_dist.ops.checks import check_integer, check_number
from reformer_dist.ops.kv_cache.checks import check_prompt, check_rows, check_token


class WindowCache:
    """Keys and values [B, H, window, D]; the token at index i of the sequence is in slot i % window."""

    def __init__(self, k: Tensor, v: Tensor, window: int, scale: float, first: Tensor | None) -> None:
        """k, v [B, H, S, D] of a prompt; first [B]: index of each row's first real token, None without padding.

        Raises ValueError.
        """
        check_prompt(first, k=k, v=v)
        check_integer("window", window, least=1)
        check_number("scale", scale, above=0)
        self._window, self._scale, self._first = window, scale, first
        self._n_tokens = k.shape[2]
        last = torch.arange(max(0, self._n_tokens - window), self._n_tokens, device=k.device)
        self._k, self._v = (self._ring(x, last) for x in (k, v))

    def _ring(self, x: Tensor, last: Tensor) -> Tensor:
        ring = x.new_zeros(*x.shape[:2], self._window, x.shape[3])
        ring[:, :, last % self._window] = x[:, :, last]
        return ring

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends the next token, q, k, v [B, H, 1, D]; returns its output. The token attends to itself.

        Raises ValueError.
        """
        check_token(self._k, q=q, k=k, v=v)
        newest = self._n_tokens
        for ring, x in ((self._k, k), (self._v, v)):
            ring[:, :, newest % self._window] = x[:, :, 0]
        self._n_tokens += 1
        filled = min(self._n_tokens, self._window)
        mask = None
        if self._first is not None:
            slots = torch.arange(filled, device=q.device)
            index = newest - (newest - slots) % self._window  # in the sequence, of the token in each slot
            mask = (index >= self._first.unsqueeze(1))[:, None, None, :]
        k, v = self._k[:, :, :filled], self._v[:, :, :filled]
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)

    def select_rows(self, rows: Tensor) -> None:
        check_rows(rows, self._k.shape[0])
        self._k, self._v = self._k[rows], self._v[rows]
        self._first = None if self._first is None else self._first[rows]

    def n_bytes(self) -> int:
        return self._k.nbytes + self._v.nbytes
