"""LSH and local attention of whole sequences by the C library, forward and backward, under the window rule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reformer_dist.ops.lsh.attention import Grads, Inputs
from reformer_dist.ops.lsh.hashing import LARGEST_FACTOR, bucket_dtype, bucket_factors
from reformer_dist.ops.lsh.native.calls import Group, hash_rows, order_rows, window_of
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.sorting import mark_padding

# Rows whose order, and in half precision copies, exist at a time.
GROUP_TOKENS = 2**14


class NativeAttention:
    """`ops.lsh.whole.WholeAttention`; the rule is a WindowRule, D a multiple of 16 up to 256."""

    def __init__(self, bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None) -> None:
        """bucket_ids [B, H, R, S], key_padding_mask [B, S]."""
        self._call = (bucket_ids, options, key_padding_mask)

    def readable(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor, out: Tensor, lse: Tensor) -> None:
        for tokens, group in _groups(*self._call):
            o = _target(out, tokens)
            k_rows = None if k is None else _rows(k, tokens)
            group.attend(_rows(q, tokens), k_rows, _rows(v, tokens), o, lse.view(-1)[tokens])
            _write(out, tokens, o)

    def attend_backward(self, inputs: Inputs, out: Tensor, lse: Tensor, grads: Grads) -> None:
        q, k, v, d_out = inputs
        for tokens, group in _groups(*self._call):
            k_rows = None if k is None else _rows(k, tokens)
            rows = (_rows(q, tokens), k_rows, _rows(v, tokens), _rows(d_out, tokens))
            found = [None if x is None else _target(x, tokens) for x in grads]
            group.attend_backward(rows, _rows(out, tokens), lse.view(-1)[tokens], found)
            for whole, part in zip(grads, found, strict=True):
                if whole is not None and part is not None:
                    _write(whole, tokens, part)


def _groups(
    bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None
) -> Iterator[tuple[slice, Group]]:
    """Consecutive (batch, head) units, and which of the flat rows [B * H * S, D] they are."""
    batch, n_heads, _, seq_len = bucket_ids.shape
    numbers = options.head_indices(batch, n_heads, bucket_ids.device)
    buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)
    size = max(1, GROUP_TOKENS // seq_len)
    for first in range(0, buckets.shape[0], size):
        part = buckets[first : first + size]
        tokens = slice(first * seq_len, (first + part.shape[0]) * seq_len)
        order, window = order_rows(part, options), window_of(options, seq_len)
        yield tokens, Group(options, seq_len, window, numbers[first : first + size], order)


def _rows(x: Tensor, tokens: slice) -> Tensor:
    """[rows, D] of x [B, H, S, D] in float32: a view where x is that."""
    return x.view(-1, x.shape[-1])[tokens].float()


def _target(x: Tensor, tokens: slice) -> Tensor:
    """Where rows of x may be written in float32: in x, or in a tensor that `_write` copies to it."""
    rows = x.view(-1, x.shape[-1])[tokens]
    return rows if x.dtype == torch.float32 else torch.empty_like(rows, dtype=torch.float32)


def _write(x: Tensor, tokens: slice, rows: Tensor) -> None:
    if x.dtype != torch.float32:
        x.view(-1, x.shape[-1])[tokens] = rows


def hash_vectors(
    vectors: Tensor, rotations: Tensor, n_buckets: int, *, factors: tuple[int, ...] | None = None
) -> Tensor:
    """As `ops.lsh.hashing.hash_vectors`: D is a multiple of 16 up to 256.

    A vector's id depends on itself alone, to the last bit: on no length, neighbour or thread.
    """
    batch, n_heads, seq_len, _ = vectors.shape
    n_hashes = rotations.shape[1]
    ids = torch.empty(batch, n_heads, n_hashes, seq_len, dtype=bucket_dtype(n_buckets))
    if n_buckets == 1:
        return ids.zero_()
    factors = bucket_factors(n_buckets, LARGEST_FACTOR["rotation"]) if factors is None else factors
    hash_rows(vectors.detach().float().contiguous(), rotations.transpose(2, 3).contiguous(), factors, ids)
    return ids
