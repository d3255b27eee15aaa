"""Calls of the C functions: tensors as addresses, and sizes."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.hashing import bucket_dtype
from reformer_dist.ops.lsh.native.library import library
from reformer_dist.ops.lsh.neighbour_rules import WindowRule
from reformer_dist.ops.lsh.options import AttentionOptions

# Slots of a bucket that a thread processes at a time: long enough to amortize the scheduling.
SPAN_LEN = 256
MAX_DIM = 256  # of vectors.h


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
        (
            ctypes.c_int64,
            "seq_len n_batch_heads n_rounds n_buckets span_len n_spans window includes_own n_threads",
        ),
        (ctypes.c_void_p, "ids query_ids queries documents ends query_ends"),
        (ctypes.c_void_p, "order spans span_counts codes query_order last_keys query_codes"),
    )


class AttentionCall(ctypes.Structure):
    """Mirrors attention.c, which documents the fields."""

    _fields_ = _fields(
        (ctypes.c_int64, "seq_len n_batch_heads n_rounds head_dim window causal sees_self n_spans n_threads"),
        (ctypes.c_int64, "dropout_threshold dropout_seed"),
        (ctypes.c_double, "scale dropout_factor"),
        (
            ctypes.c_void_p,
            "order spans span_counts codes query_order last_keys query_codes documents head_indices positions "
            "q k v d_out out lse sums key_scales along dq dk dv",
        ),
    )


def row_dot(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Fills out [n_rows] with the dot products of the rows of a and b [n_rows, D]; all float32."""
    n_rows, dim = a.shape
    check_dim(dim)
    pointers = [address("a", a, n_rows, dim), address("b", b, n_rows, dim), address("out", out, n_rows)]
    sizes = (ctypes.c_int64(n) for n in (n_rows, dim, torch.get_num_threads()))
    library().reformer_row_dot(*map(ctypes.c_void_p, pointers), *sizes)


def hash_rows(x: Tensor, rotations: Tensor, factors: tuple[int, ...], ids: Tensor) -> None:
    """Fills ids [B, H, R, S] with buckets of x [B, H, S, D], float32, under rotations [H, R, columns, D]."""
    batch, n_heads, n_rounds, seq_len = ids.shape
    sizes, dim = torch.tensor(factors, dtype=torch.int64, device="cpu"), x.shape[3]
    check_dim(dim)
    n_columns = sum(factors) // 2
    call = HashCall(
        seq_len, batch * n_heads, n_heads, n_rounds, dim, n_columns, len(factors),
        ids.element_size(), torch.get_num_threads(),
        address("factors", sizes, len(factors), dtype=torch.int64),
        address("vectors", x, batch, n_heads, seq_len, dim),
        address("rotations", rotations, n_heads, n_rounds, n_columns, dim),
        address("bucket_ids", ids, batch, n_heads, n_rounds, seq_len, dtype=bucket_dtype(math.prod(factors))),
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
    query_order: Tensor | None = None
    """int32 [R, BH * S] as `order`, of the rows as queries, if the buckets of the keys are their own."""
    last_keys: Tensor | None = None
    """int32 [R, BH * S] likewise: slot of the last key up to each query."""
    query_codes: Tensor | None = None
    """int32 [R, BH * S] likewise, as `codes`."""

    def addresses(self, n_rounds: int, n_rows: int) -> tuple[int | None, ...]:
        """Pointers to the tensors."""
        names = ("codes", "query_order", "last_keys", "query_codes")
        return (
            address("order", self.order, n_rounds, n_rows, dtype=torch.int32),
            address("spans", self.spans, n_rounds, self.spans.shape[1], 4, dtype=torch.int32),
            address("span_counts", self.span_counts, n_rounds, 2, dtype=torch.int32),
            *(address(name, getattr(self, name), n_rounds, n_rows, dtype=torch.int32) for name in names),
        )


def window_of(options: AttentionOptions, seq_len: int) -> int:
    """The window, at most seq_len: the length of whole sequences, also for a partition."""
    assert isinstance(options.rule, WindowRule)
    return min(options.rule.window, seq_len)


def order_rows(
    buckets: Tensor,
    options: AttentionOptions,
    n_buckets: int,
    query_bounds: Tensor | None = None,
    query_buckets: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    is_whole: bool = True,
) -> Order:
    """The order of bucket ids [BH, R, S], where n_buckets marks absent rows. Raises ValueError for other ids.

    query_bounds [R, n_buckets, 2]: of a partition, which is one head; see `Shard.query_bounds`. The caller adds
    its codes, which depend on the whole order. query_buckets: ids of the rows as queries, if those of the keys are
    their own. document_ids [BH, S]: see `Shard.document_ids`.
    """
    n_batch_heads, n_rounds, seq_len = buckets.shape
    window = window_of(options, seq_len)
    span_len = max(SPAN_LEN, -(-2 * window // SPAN_LEN) * SPAN_LEN)  # every other span has separate keys
    n_runs = n_buckets
    if document_ids is not None:  # at most
        n_documents = int((document_ids.diff(dim=1) != 0).sum(dim=1).max()) + 1 if document_ids.numel() else 0
        n_runs = min(seq_len, n_buckets * n_documents)
    n_spans = n_batch_heads * (n_runs + seq_len // span_len)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="cpu")

    def per_row(*, needed: bool) -> Tensor | None:
        return ints(n_rounds, n_batch_heads * seq_len) if needed else None

    has_own, has_codes = query_buckets is not None, options.count_pairs_once and n_rounds > 1 and is_whole
    order = Order(
        ints(n_rounds, n_batch_heads * seq_len), ints(n_rounds, n_spans, 4), ints(n_rounds, 2),
        per_row(needed=has_codes), per_row(needed=has_own), per_row(needed=has_own),
        per_row(needed=has_own and has_codes),
    )  # fmt: skip
    ids, ends = buckets.int().contiguous(), ints(n_rounds, n_batch_heads, n_buckets + 2)
    query_ids, query_ends = (
        (None, None) if query_buckets is None else (query_buckets.int().contiguous(), ends.clone())
    )
    call = OrderCall(
        seq_len, n_batch_heads, n_rounds, n_buckets, span_len, n_spans, window,
        options.rule.sees_self, torch.get_num_threads(),
        address("bucket_ids", ids, n_batch_heads, n_rounds, seq_len, dtype=torch.int32),
        address("query_ids", query_ids, n_batch_heads, n_rounds, seq_len, dtype=torch.int32),
        address("query_bounds", query_bounds, n_rounds, n_batch_heads * n_buckets, 2, dtype=torch.int32),
        address("document_ids", document_ids, n_batch_heads, seq_len, dtype=torch.int32),
        address("ends", ends, n_rounds, n_batch_heads, n_buckets + 2, dtype=torch.int32),
        address("query_ends", query_ends, n_rounds, n_batch_heads, n_buckets + 2, dtype=torch.int32),
        *order.addresses(n_rounds, n_batch_heads * seq_len),
    )  # fmt: skip
    if not library().reformer_order(ctypes.byref(call)):
        ids = ids if query_ids is None else torch.stack([ids, query_ids])
        wrong = ids[(ids < 0) | (ids > n_buckets)]
        raise ValueError(f"bucket_ids={wrong[0].item()}: must be from 0 to {n_buckets - 1}, below n_buckets")
    return order


def check_dim(dim: int) -> None:
    """Raises ValueError for a width of rows that the C library has no room for."""
    if dim % 16 or not 16 <= dim <= MAX_DIM:
        raise ValueError(f"head_dim={dim}: must be a multiple of 16 up to {MAX_DIM}")


def address(name: str, x: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> int | None:
    """Pointer to a tensor, which the caller keeps alive until the call returns; None without one.

    C code can't check what is there: raises ValueError unless it is a contiguous CPU tensor of this shape, dtype.
    """
    if x is None:
        return None
    is_readable = x.device.type == "cpu" and x.layout is torch.strided and x.is_contiguous()
    if not is_readable or x.dtype != dtype or x.shape != shape:
        found = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise ValueError(f"{name}={found}: the C library needs {dtype} {list(shape)}, contiguous, on the CPU")
    return x.data_ptr()
