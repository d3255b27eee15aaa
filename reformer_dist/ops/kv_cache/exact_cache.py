"""KV cache of exact attention: all keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_dist.ops.kv_cache.checks import check_prompt, check_rows, check_token
from reformer_dist.ops.kv_cache.growable_tensor import GrowableTensor


class ExactCache:
    """Keys and values [B, H, S, D] of all tokens; memory and cost per token grow with the sequence."""

    def __init__(self, k: Tensor, v: Tensor, first: Tensor | None) -> None:
        """first [B]: index of each row's first real token; None without padding. Raises ValueError."""
        check_prompt(first, k=k, v=v)
        self._k, self._v, self._first = GrowableTensor(k, dim=2), GrowableTensor(v, dim=2), first

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends the next token, q, k, v [B, H, 1, D]; returns its output. Raises ValueError."""
        check_token(self._k.filled, q=q, k=k, v=v)
        self._k.append(k)
        self._v.append(v)
        mask = None
        if self._first is not None:
            index = torch.arange(self._k.size, device=q.device)
            mask = (index >= self._first.unsqueeze(1))[:, None, None, :]
        return F.scaled_dot_product_attention(q, self._k.filled, self._v.filled, attn_mask=mask)

    def select_rows(self, rows: Tensor) -> None:
        check_rows(rows, self._k.filled.shape[0])
        self._k.select(0, rows)
        self._v.select(0, rows)
        self._first = None if self._first is None else self._first[rows]

    def n_bytes(self) -> int:
        return self._k.n_bytes() + self._v.n_bytes()
