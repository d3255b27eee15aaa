"""Attention to another sequence: each query attends to the keys of its bucket, in every round.

Defined by `reference.reference_cross_attention`. Short sequences use dense matrices, which cost less than sorting;
long ones go bucket by bucket (`cross_tiles`), in time and memory that do not grow with the product of the lengths.
Plain PyTorch, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_range
from reformer_dist.ops.dropout import keep_mask, token_keys
from reformer_dist.ops.lsh.cross_tiles import tiled_cross_attention
from reformer_dist.ops.lsh.hashing import single_bucket_ids
from reformer_dist.ops.lsh.options import CrossOptions
from reformer_dist.ops.lsh.reference import reference_cross_attention

# Pairs of one head up to which dense matrices are faster.
DENSE_PAIRS = 2**14


@dataclass(frozen=True)
class CrossKeys:
    """Keys and values of the other sequence, of T tokens."""

    k: Tensor
    """[B, H, T, D]"""
    v: Tensor
    """[B, H, T, D]"""
    ids: Tensor | None
    """[B, H, R, T] buckets of the keys; None if every query attends to every key."""
    padding_mask: Tensor | None = None
    """[B, T], True for real keys."""

    def select_rows(self, rows: Tensor) -> CrossKeys:
        """The keys of batch rows [N] int64, repeats allowed. Raises ValueError."""
        TensorChecks().integers("rows", rows, "N")
        check_range("rows", rows, self.k.shape[0], limit="rows of the keys")
        ids, mask = (None if x is None else x[rows] for x in (self.ids, self.padding_mask))
        return CrossKeys(self.k[rows], self.v[rows], ids, mask)

    def n_bytes(self) -> int:
        """Total size of the tensors."""
        return sum(x.nbytes for x in (self.k, self.v, self.ids, self.padding_mask) if x is not None)


def cross_attention(q: Tensor, query_ids: Tensor | None, keys: CrossKeys, options: CrossOptions) -> Tensor:
    """Softmax over all (round, key) pairs in a query's bucket: [B, H, S, D] in v's dtype, 0 if there are none.

    q [B, H, S, D]; query_ids [B, H, R, S] below options.n_buckets, None if keys.ids is None. Raises ValueError.
    """
    _check(q, query_ids, keys, options)
    k, v, key_ids, key_padding_mask = keys.k, keys.v, keys.ids, keys.padding_mask
    if key_ids is None and options.dropout == 0.0:
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
    if query_ids is None or key_ids is None:
        query_ids, key_ids = single_bucket_ids(q), single_bucket_ids(k)
    if options.is_reference:
        return reference_cross_attention(
            q,
            k,
            v,
            query_ids,
            key_ids,
            scale=options.scale,
            key_padding_mask=key_padding_mask,
            count_pairs_once=options.count_pairs_once,
            dropout=options.dropout,
            dropout_seed=options.dropout_seed,
            head_indices=options.head_indices(q.shape[0], q.shape[1], q.device),
        )
    attend = _dense if q.shape[2] * k.shape[2] <= DENSE_PAIRS else tiled_cross_attention
    return attend(q, k, v, query_ids, key_ids, options, key_padding_mask)


def _check(q: Tensor, query_ids: Tensor | None, keys: CrossKeys, options: CrossOptions) -> None:
    checks = TensorChecks()
    checks.floats("q", q, "B H S D")
    checks.floats("k", keys.k, "B H T D")
    checks.floats("v", keys.v, "B H T D")
    checks.mask("padding_mask", keys.padding_mask, "B T")
    options.check_rows(checks)
    if (query_ids is None) != (keys.ids is None):
        missing = "query_ids" if query_ids is None else "keys.ids"
        raise ValueError(f"{missing}=None: queries and keys must both have bucket ids, or neither")
    if query_ids is not None and keys.ids is not None:
        checks.integers("query_ids", query_ids, "B H R S")
        checks.integers("keys.ids", keys.ids, "B H R T")


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ids: Tensor,
    key_ids: Tensor,
    options: CrossOptions,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """All pairs of a head in one matrix."""
    n_rounds = query_ids.shape[2]
    rounds = [query_ids[:, :, r, :, None] == key_ids[:, :, r, None, :] for r in range(n_rounds)]
    n_shared = rounds[0] if n_rounds == 1 else torch.stack(rounds).sum(dim=0)
    if key_padding_mask is not None:
        n_shared = n_shared * key_padding_mask[:, None, None, :]
    is_weighted = n_rounds > 1 and not options.count_pairs_once
    if options.dropout == 0.0:
        mask = n_shared.to(q.dtype).log() if is_weighted else n_shared > 0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
    keep_masks = _keep_masks(q, k, n_rounds, options)
    n_kept = torch.stack([same * keep for same, keep in zip(rounds, keep_masks, strict=True)]).sum(dim=0)
    factors = n_kept.float() / n_shared.clamp(min=1) / (1.0 - options.dropout)
    with torch.autocast(q.device.type, enabled=False):
        scores = options.scale * (q.float() @ k.float().transpose(-1, -2))
        if is_weighted:
            scores = scores + n_shared.float().clamp_min(1).log()
        weights = scores.masked_fill(n_shared == 0, torch.finfo(torch.float32).min).softmax(-1)
        return ((weights * (factors * (n_shared > 0))) @ v.float()).to(v.dtype)


def _keep_masks(q: Tensor, k: Tensor, n_rounds: int, options: CrossOptions) -> list[Tensor]:
    """The pairs that dropout keeps in each round, [B, H, S, T] each."""
    head_indices = options.head_indices(q.shape[0], q.shape[1], q.device).view(*q.shape[:2], 1)
    query_positions, key_positions = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    masks = []
    for round_ in range(n_rounds):
        query_keys, key_keys = (
            token_keys(head_indices, positions, round_, options.dropout_seed, is_query)
            for positions, is_query in ((query_positions, True), (key_positions, False))
        )
        masks.append(keep_mask(query_keys, key_keys, options.dropout))
    return masks
