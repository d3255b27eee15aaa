"""Calls of the C functions: tensors as addresses, and sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.native.library import library
from reformer_dist.ops.lsh.neighbour_rules import WindowRule
from reformer_dist.ops.lsh.options import AttentionOptions

# Slots of a bucket that a thread processes at a time: long enough to amortize the scheduling.
SPAN_LEN = 256


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class HashCall(ctypes.Structure):
    """Mirrors hash.c, which documents the fields."""

    _fields_ = _fields(
        (ctypes.c_int64, "seq_len n_batch_heads n_heads n_rounds head_dim n_columns n_factors id_bytes n_threads"),
        (ctypes.c_void_p, "factors x rotations ids"),
    )


class OrderCall(ctypes.Structure):
    """Mirrors order.c, which documents the fields."""

    _fields_ = _fields(
        (ctypes.c_int64, "seq_len n_batch_heads n_rounds n_buckets span_len n_spans window n_threads"),
        (ctypes.c_void_p, "ids queries ends order spans span_counts codes"),
    )


class AttentionCall(ctypes.Structure):
    """Mirrors attention.c, which documents the fields."""

    _fields_ = _fields(
        (ctypes.c_int64, "seq_len n_batch_heads n_rounds head_dim window causal sees_self n_spans n_threads"),
        (ctypes.c_int64, "dropout_threshold dropout_seed"),
        (ctypes.c_double, "scale dropout_factor"),
        (
            ctypes.c_void_p,
            "order spans span_counts codes head_indices positions "
            "q k v d_out out lse sums key_scales along dq dk dv",
        ),
    )


def row_dot(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Fills out [n_rows] with the dot products of the rows of a and b [n_rows, D]; all float32."""
    sizes = (ctypes.c_int64(n) for n in (*a.shape, torch.get_num_threads()))
    pointers = (ctypes.c_void_p(address) for address in addresses(a, b, out))
    library().reformer_row_dot(*pointers, *sizes)


def hash_rows(x: Tensor, rotations: Tensor, factors: tuple[int, ...], ids: Tensor) -> None:
    """Fills ids [B, H, R, S] with buckets of x [B, H, S, D], float32, under rotations [H, R, columns, D]."""
    batch, n_heads, n_rounds, seq_len = ids.shape
    sizes = torch.tensor(factors, dtype=torch.int64)
    call = HashCall(
        seq_len, batch * n_heads, n_heads, n_rounds, x.shape[3], rotations.shape[2], len(factors),
        ids.element_size(), torch.get_num_threads(), *addresses(sizes, x, rotations, ids),
    )  # fmt: skip
    library().reformer_hash(ctypes.byref(call))


@dataclass(frozen=True)
class Order:
    """All rounds of BH heads of S rows, sorted by (head, bucket, position)."""

    order: Tensor
    """int32 [R, BH * S] row in each slot."""
    spans: Tensor
    """int32 [R, n_spans, 4]: see attention.c."""
    span_counts: Tensor
    """int32 [R, 2]: see attention.c."""
    codes: Tensor | None
    """int32 [R, BH * S] position codes of the rows, with count_pairs_once."""


def window_of(options: AttentionOptions, seq_len: int) -> int:
    """The window, at most seq_len: the length of whole sequences, also for a partition."""
    assert isinstance(options.rule, WindowRule)
    return min(options.rule.window, seq_len)


def order_rows(buckets: Tensor, options: AttentionOptions, query_bounds: Tensor | None = None) -> Order:
    """The order of bucket ids [BH, R, S], where n_buckets marks absent rows. Raises ValueError for other ids.

    query_bounds [R, n_buckets, 2]: of a partition, which is one head; see `Shard.query_bounds`. The caller adds
    its codes, which depend on the whole order.
    """
    n_batch_heads, n_rounds, seq_len = buckets.shape
    n_buckets = options.n_buckets if query_bounds is None else query_bounds.shape[1]
    window = window_of(options, seq_len)
    span_len = max(SPAN_LEN, -(-2 * window // SPAN_LEN) * SPAN_LEN)  # every other span has separate keys
    n_spans = n_batch_heads * (n_buckets + seq_len // span_len)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32)

    counts_once = options.count_pairs_once and n_rounds > 1 and query_bounds is None
    codes = ints(n_rounds, n_batch_heads * seq_len) if counts_once else None
    order = Order(ints(n_rounds, n_batch_heads * seq_len), ints(n_rounds, n_spans, 4), ints(n_rounds, 2), codes)
    ids, ends = buckets.int().contiguous(), ints(n_rounds, n_batch_heads, n_buckets + 2)
    call = OrderCall(
        seq_len, n_batch_heads, n_rounds, n_buckets, span_len, n_spans, window, torch.get_num_threads(),
        *addresses(ids, query_bounds, ends, order.order, order.spans, order.span_counts, order.codes),
    )  # fmt: skip
    if not library().reformer_order(ctypes.byref(call)):
        wrong = ids[(ids < 0) | (ids > n_buckets)]
        raise ValueError(f"bucket_ids: must be from 0 to {n_buckets - 1}, below n_buckets, not {wrong[0].item()}")
    return order


def addresses(*tensors: Tensor | None) -> Iterable[int | None]:
    """Pointers to contiguous tensors, which the caller keeps alive until the call returns."""
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous()
        yield None if tensor is None else tensor.data_ptr()
