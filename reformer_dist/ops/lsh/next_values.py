"""Values of the next token: the key of token j carries the value of token j + 1.

With a shared query-key, a query finds earlier tokens that look like it; what followed them is one position on.
Strictly causal, since no token attends to itself: j < t means j + 1 <= t. A query that met no key gets 0, because
the value at its own position is that of its successor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zero_padding(v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """v [B, H, S, D] with zeros at padding (mask [B, S] False), so that the last real token has no successor."""
    return v if key_padding_mask is None else v.masked_fill(~key_padding_mask[:, None, :, None], 0)


def next_values(v: Tensor, n_heads: int, following: Tensor | None = None) -> Tensor:
    """v [B, H, S, D] whose first n_heads heads are moved one position on; the others stay.

    following [B, n_heads, D]: values of the token after the last, on the next rank; None: 0, there is none.
    """
    if n_heads == 0:
        return v
    last = torch.zeros_like(v[:, :n_heads, 0]) if following is None else following
    moved = torch.cat([v[:, :n_heads, 1:], last.unsqueeze(2)], dim=2)
    return moved if n_heads == v.shape[1] else torch.cat([moved, v[:, n_heads:]], dim=1)
