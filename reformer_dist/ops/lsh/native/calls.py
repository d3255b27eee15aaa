"""What the C functions are given: tensors as addresses, and sizes. Rows are those of a group of units."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.native.library import library
from reformer_dist.ops.lsh.online_softmax import LOG2_E
from reformer_dist.ops.lsh.options import AttentionOptions, WindowRule

# Places of a bucket that one thread takes in turn: enough to outlast what it costs to ask for them.
SPAN_LEN = 256


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class HashCall(ctypes.Structure):
    """As in hash.c, which says what each is."""

    _fields_ = _fields(
        (ctypes.c_int64, "seq_len n_batch_heads n_heads n_rounds head_dim n_columns n_factors id_bytes n_threads"),
        (ctypes.c_void_p, "factors x rotations ids"),
    )


class OrderCall(ctypes.Structure):
    """As in order.c, which says what each is."""

    _fields_ = _fields(
        (ctypes.c_int64, "seq_len n_batch_heads n_rounds n_buckets span_len n_spans window n_threads"),
        (ctypes.c_void_p, "ids queries ends order spans span_counts codes"),
    )


class Call(ctypes.Structure):
    """As in attention.c, which says what each is."""

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
    pointers = (ctypes.c_void_p(address) for address in _addresses(a, b, out))
    library().reformer_row_dot(*pointers, *sizes)


def hash_rows(x: Tensor, rotations: Tensor, factors: tuple[int, ...], ids: Tensor) -> None:
    """Fills ids [B, H, R, S] with buckets of x [B, H, S, D], float32, under rotations [H, R, columns, D]."""
    batch, n_heads, n_rounds, seq_len = ids.shape
    sizes = torch.tensor(factors, dtype=torch.int64)
    call = HashCall(
        seq_len, batch * n_heads, n_heads, n_rounds, x.shape[3], rotations.shape[2], len(factors),
        ids.element_size(), torch.get_num_threads(), *_addresses(sizes, x, rotations, ids),
    )  # fmt: skip
    library().reformer_hash(ctypes.byref(call))


@dataclass(frozen=True)
class Order:
    """All rounds of BH units of S rows, sorted by (unit, bucket, position)."""

    order: Tensor
    """int32 [R, BH * S] row at each place."""
    spans: Tensor
    """int32 [R, n_spans, 4]: see attention.c."""
    span_counts: Tensor
    """int32 [R, 2] likewise."""
    codes: Tensor | None
    """int32 [R, BH * S] of each row, with count_pairs_once."""


def window_of(options: AttentionOptions, seq_len: int) -> int:
    """The window, or seq_len where that is shorter: of the whole order, of which the rows here may be a part."""
    assert isinstance(options.rule, WindowRule)
    return min(options.rule.window, seq_len)


def order_rows(buckets: Tensor, options: AttentionOptions, query_bounds: Tensor | None = None) -> Order:
    """The order of bucket ids [BH, R, S], where n_buckets marks absent rows. Raises ValueError for other ids.

    query_bounds, of a partition, which counts as one head: [R, n_buckets, 2], see `Shard.query_bounds`. Its codes
    are left to the caller, who knows the whole order.
    """
    n_batch_heads, n_rounds, seq_len = buckets.shape
    n_buckets = options.n_buckets if query_bounds is None else query_bounds.shape[1]
    window = window_of(options, seq_len)
    span_len = max(SPAN_LEN, -(-2 * window // SPAN_LEN) * SPAN_LEN)  # every other span has keys of its own
    n_spans = n_batch_heads * (n_buckets + seq_len // span_len)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32)

    counts_once = options.count_pairs_once and n_rounds > 1 and query_bounds is None
    codes = ints(n_rounds, n_batch_heads * seq_len) if counts_once else None
    found = Order(ints(n_rounds, n_batch_heads * seq_len), ints(n_rounds, n_spans, 4), ints(n_rounds, 2), codes)
    ids, ends = buckets.int().contiguous(), ints(n_rounds, n_batch_heads, n_buckets + 2)
    call = OrderCall(
        seq_len, n_batch_heads, n_rounds, n_buckets, span_len, n_spans, window, torch.get_num_threads(),
        *_addresses(ids, query_bounds, ends, found.order, found.spans, found.span_counts, found.codes),
    )  # fmt: skip
    if not library().reformer_order(ctypes.byref(call)):
        wrong = ids[(ids < 0) | (ids > n_buckets)]
        raise ValueError(f"bucket_ids: must be from 0 to {n_buckets - 1}, below n_buckets, not {wrong[0].item()}")
    return found


@dataclass(frozen=True)
class Group:
    """Units that are attended by one call."""

    options: AttentionOptions
    seq_len: int
    """Rows of a unit."""
    window: int
    """See `window_of`."""
    head_indices: Tensor
    """[BH] numbers in their step: `DropoutOptions.head_indices`; with positions, [rows]."""
    order: Order
    positions: Tensor | None = None
    """[rows] of rows that are held; None where units are whole."""

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Fills out [rows, D] and lse [rows]; all float32 and contiguous, as everything here.

        k is None: keys are q / |q|.
        """
        weights = torch.empty_like(lse)
        library().reformer_attend(self._call((q, k, v, None, out, lse, weights), (None, None, None)))

    def attend_backward(
        self, q: Tensor, k: Tensor | None, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
        dq: Tensor, dk: Tensor | None, dv: Tensor,
    ) -> None:  # fmt: skip
        """Adds to dq, dk and dv. k and dk are None: likewise, and dq gets what keys get."""
        library().reformer_attend_backward(self._call((q, k, v, d_out, None, lse, delta), (dq, dk, dv)))

    def _call(
        self, rows: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> object:  # fmt: skip
        options, order, rule = self.options, self.order, self.options.rule
        assert isinstance(rule, WindowRule)
        (q, k, *others), (dq, dk, dv) = rows, grads
        shared, lse = k is None, rows[5]
        factors, along = (torch.empty_like(lse), torch.empty_like(lse)) if shared else (None, None)
        numbers, positions = (
            None if x is None or options.dropout == 0 else x.int() for x in (self.head_indices, self.positions)
        )
        pointers = (order.order, order.spans, order.span_counts, order.codes, numbers, positions)
        n_rounds, n_rows = order.order.shape
        call = Call(
            self.seq_len, n_rows // max(1, self.seq_len), n_rounds, q.shape[1],
            self.window, rule.causal, rule.sees_self,
            order.spans.shape[1], torch.get_num_threads(),
            int(options.dropout * 2**31), options.dropout_seed,
            options.scale * LOG2_E, 1 / (1 - options.dropout),
            *_addresses(*pointers, q, q if shared else k, *others),
            *_addresses(factors, along, dq, dq if shared else dk, dv),
        )  # fmt: skip
        call.kept = (numbers, positions, factors, along)  # whose memory the call points to
        return ctypes.byref(call)


def _addresses(*tensors: Tensor | None) -> Iterable[int | None]:
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous()
        yield None if tensor is None else tensor.data_ptr()
