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


def zero_starts(v: Tensor, n_heads: int, starts: Tensor | None) -> Tensor:
    """v [B, H, S, D] with zeros in the first n_heads heads at the first tokens of documents (starts [B, S] True).

    They succeed no token: the last one of a document has no successor.
    """
    if starts is None:
        return v
    is_moved = torch.arange(v.shape[1], device=v.device) < n_heads
    return v.masked_fill(starts[:, None, :, None] & is_moved[:, None, None], 0)


def document_starts(document_ids: Tensor, preceding: Tensor | None = None) -> Tensor:
    """Whether each token is the first of its document, bool [B, S], from document_ids [B, S].

    preceding [B]: document of the token before the first, on the previous rank; None: there is none.
    """
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    torch.ne(document_ids[:, 1:], document_ids[:, :-1], out=starts[:, 1:])
    if preceding is not None:
        starts[:, 0] = document_ids[:, 0] != preceding
    return starts


def next_values(v: Tensor, n_heads: int, following: Tensor | None = None) -> Tensor:
    """v [B, H, S, D] whose first n_heads heads are moved one position on; the others stay.

    following [B, n_heads, D]: values of the token after the last, on the next rank; None: 0, there is none.
    """
    if n_heads == 0:
        return v
    last = torch.zeros_like(v[:, :n_heads, 0]) if following is None else following
    moved = torch.cat([v[:, :n_heads, 1:], last.unsqueeze(2)], dim=2)
    return moved if n_heads == v.shape[1] else torch.cat([moved, v[:, n_heads:]], dim=1)
