"""Exact attention through PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_document_ids, check_dropout, check_integer


@dataclass(frozen=True)
class ExactOptions:
    """Options of exact attention."""

    causal: bool
    dropout: float
    seed: int
    rows: Tensor | None
    """[B] indices of the rows in the global batch; None: 0, 1, .."""
    document_ids: Tensor | None = None
    """[B, S] as in `lsh.AttentionOptions`. Each document is a call of its own, so no mask of S x S exists."""

    def __post_init__(self) -> None:
        check_dropout("dropout", self.dropout)
        check_integer("seed", self.seed)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, *, first_head: int, n_heads: int
    ) -> Tensor:
        """Attention of whole sequences [B, H, S, D]; the H heads start at first_head of the layer's n_heads.

        Raises ValueError.
        """
        _check(q, k, v, key_padding_mask, self.rows)
        check_integer("first_head", first_head, least=0, most=n_heads - q.shape[1])
        rows = range(len(q)) if self.rows is None or self.dropout == 0.0 else self.rows.tolist()
        head_indices = [row * n_heads + first_head for row in rows]
        if self.document_ids is None:
            return self._attend(q, k, v, key_padding_mask, head_indices)
        check_document_ids(TensorChecks(B=len(q), S=q.shape[2]), self.document_ids)
        outs = []
        for row, lengths in enumerate(document_lengths(self.document_ids)):
            # split, whose backward is one concatenation, unlike that of slices
            parts = (x[row : row + 1].split(lengths, dim=2) for x in (q, k, v))
            masks: Sequence[Tensor | None] = [None] * len(lengths)
            if key_padding_mask is not None:
                masks = key_padding_mask[row : row + 1].split(lengths, dim=1)
            starts = [0, *itertools.accumulate(lengths[:-1])]
            documents = [
                self._attend(q, k, v, mask, head_indices[row : row + 1], start)
                for q, k, v, mask, start in zip(*parts, masks, starts, strict=True)
            ]
            outs.append(torch.cat(documents, dim=2))
        return torch.cat(outs)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        head_indices: Sequence[int],
        start: int = 0,
    ) -> Tensor:
        """head_indices: of the first head of each row, within the step; start: position of the first token."""
        if self.dropout == 0.0:
            return exact_attention(q, k, v, causal=self.causal, key_padding_mask=key_padding_mask)
        mask = None if key_padding_mask is None else _mask(key_padding_mask, self.causal)
        outs = []
        # PyTorch's kernels draw dropout from the global generator only, so heads run one by one with a seed each
        for row, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
            one_head = (slice(row, row + 1), slice(head, head + 1))
            # spread out, since the generators may be correlated for adjacent seeds, in the low bits that CPUs use
            offset = (head_indices[row] + head) * 0x9E3779B97F4A7C15 + start * 0xBF58476D1CE4E5B9
            with torch.random.fork_rng(devices=[q.device] if q.is_cuda else []):
                torch.manual_seed((self.seed + offset) % 2**63)
                outs.append(
                    F.scaled_dot_product_attention(
                        q[one_head],
                        k[one_head],
                        v[one_head],
                        attn_mask=None if mask is None else mask[row : row + 1],
                        dropout_p=self.dropout,
                        is_causal=self.causal and mask is None,
                    )
                )
        return torch.cat(outs).view(q.shape)


def document_lengths(document_ids: Tensor) -> list[list[int]]:
    """Tokens of each document of each row, from document_ids [B, S]."""
    return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in document_ids]


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_padding_mask: Tensor | None = None
) -> Tensor:
    """softmax(q k / sqrt(D)) v, [B, H, S, D]; a padded token (mask [B, S] False) attends to itself only.

    Raises ValueError for tensors of other shapes, dtypes or devices.
    """
    _check(q, k, v, key_padding_mask)
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(key_padding_mask, causal))


def _check(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, rows: Tensor | None = None) -> None:
    checks = TensorChecks()
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floats(name, x, "B H S D")
    checks.mask("key_padding_mask", key_padding_mask, "B S")
    if rows is not None:
        checks.integers("rows", rows, "B")


def _mask(key_padding_mask: Tensor, causal: bool) -> Tensor:
    """[B, 1, S, S], True for pairs that attend; a padded query attends to itself only."""
    seq_len = key_padding_mask.shape[1]
    mask = key_padding_mask[:, None, None, :] & key_padding_mask[:, None, :, None]
    if causal:
        mask = mask.tril()
    diagonal = torch.eye(seq_len, dtype=torch.bool, device=mask.device)
    return mask | (diagonal & ~key_padding_mask[:, None, :, None])
