"""Exact attention through PyTorch's own kernels, for layers that are to see everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ExactOptions:
    """What exact attention needs to know beside its tensors."""

    causal: bool
    dropout: float
    seed: int
    rows: Tensor | None
    """[B] numbers of the batch rows in their step; None: 0, 1, .."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, *, first_head: int, n_heads: int
    ) -> Tensor:
        """Over whole sequences [B, H, S, D], whose heads are those from first_head of the layer's n_heads."""
        if self.dropout == 0.0:
            return exact_attention(q, k, v, causal=self.causal, key_padding_mask=key_padding_mask)

        rows = range(len(q)) if self.rows is None else self.rows.tolist()

        def seed_of(unit: int) -> int:
            row, head = divmod(unit, q.shape[1])
            # far apart, since neighbouring seeds of the kernels' generators may look alike
            number = rows[row] * n_heads + head + first_head
            return (self.seed + number * 0x9E3779B97F4A7C15) % 2**63

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
    """softmax(q k / sqrt(D)) v, [B, H, S, D]; a padded token (mask [B, S] False) attends to itself alone."""
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
    """The same with dropout of weights, whose mask is drawn for each unit (batch row, head) from its own seed.

    seed_of(unit): of the unit-th of the B * H at hand. PyTorch's kernels draw from the global generator only,
    so units go one by one, which also keeps no more than one unit's weights at a time.
    """
    batch, n_heads = q.shape[:2]
    mask = None if key_padding_mask is None else _mask(key_padding_mask, causal)
    outs = []
    for unit in range(batch * n_heads):
        row, head = divmod(unit, n_heads)
        its = (slice(row, row + 1), slice(head, head + 1))
        with torch.random.fork_rng(devices=[q.device] if q.is_cuda else []):
            torch.manual_seed(seed_of(unit))
            outs.append(
                F.scaled_dot_product_attention(
                    q[its],
                    k[its],
                    v[its],
                    attn_mask=None if mask is None else mask[row : row + 1],
                    dropout_p=dropout,
                    is_causal=causal and mask is None,
                )
            )
    return torch.cat(outs).view(batch, n_heads, *q.shape[2:])


def _mask(key_padding_mask: Tensor, causal: bool) -> Tensor:
    """[B, 1, S, S], True where a query may look; a padded query looks at itself alone."""
    seq_len = key_padding_mask.shape[1]
    mask = key_padding_mask[:, None, None, :] & key_padding_mask[:, None, :, None]
    if causal:
        mask = mask.tril()
    own = torch.eye(seq_len, dtype=torch.bool, device=mask.device)
    return mask | (own & ~key_padding_mask[:, None, :, None])
