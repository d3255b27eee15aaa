"""Exact attention through PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ExactOptions:
    """Options of exact attention."""

    causal: bool
    dropout: float
    seed: int
    rows: Tensor | None
    """[B] indices of the rows in the global batch; None: 0, 1, .."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, *, first_head: int, n_heads: int
    ) -> Tensor:
        """Attention of whole sequences [B, H, S, D]; the H heads start at first_head of the layer's n_heads."""
        if self.dropout == 0.0:
            return exact_attention(q, k, v, causal=self.causal, key_padding_mask=key_padding_mask)

        rows = range(len(q)) if self.rows is None else self.rows.tolist()

        def seed_of(head_index: int) -> int:
            row, head = divmod(head_index, q.shape[1])
            # spread out, since the kernels' generators may be correlated for adjacent seeds
            global_index = rows[row] * n_heads + head + first_head
            return (self.seed + global_index * 0x9E3779B97F4A7C15) % 2**63

        return exact_attention_with_dropout(
            q,
            k,
            v,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            dropout=self.dropout,
            seed_of=seed_of,
        )


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_padding_mask: Tensor | None = None
) -> Tensor:
    """softmax(q k / sqrt(D)) v, [B, H, S, D]; a padded token (mask [B, S] False) attends to itself only."""
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(key_padding_mask, causal))


def exact_attention_with_dropout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_padding_mask: Tensor | None,
    dropout: float,
    seed_of: Callable[[int], int],
) -> Tensor:
    """`exact_attention` with dropout of the weights, whose mask has its own seed for each (batch row, head).

    seed_of(head_index): seed of one of the B * H local heads. PyTorch's kernels draw from the global generator
    only, so heads run one by one, which also keeps the weights of a single head at a time.
    """
    batch, n_heads = q.shape[:2]
    mask = None if key_padding_mask is None else _mask(key_padding_mask, causal)
    outs = []
    for head_index in range(batch * n_heads):
        row, head = divmod(head_index, n_heads)
        one_head = (slice(row, row + 1), slice(head, head + 1))
        with torch.random.fork_rng(devices=[q.device] if q.is_cuda else []):
            torch.manual_seed(seed_of(head_index))
            outs.append(
                F.scaled_dot_product_attention(
                    q[one_head],
                    k[one_head],
                    v[one_head],
                    attn_mask=None if mask is None else mask[row : row + 1],
                    dropout_p=dropout,
                    is_causal=causal and mask is None,
                )
            )
    return torch.cat(outs).view(batch, n_heads, *q.shape[2:])


def _mask(key_padding_mask: Tensor, causal: bool) -> Tensor:
    """[B, 1, S, S], True for pairs that attend; a padded query attends to itself only."""
    seq_len = key_padding_mask.shape[1]
    mask = key_padding_mask[:, None, None, :] & key_padding_mask[:, None, :, None]
    if causal:
        mask = mask.tril()
    diagonal = torch.eye(seq_len, dtype=torch.bool, device=mask.device)
    return mask | (diagonal & ~key_padding_mask[:, None, :, None])
