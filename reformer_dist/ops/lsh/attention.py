"""LSH and local attention as one autograd function, whichever backend computes it and wherever the tokens are.

A *backend* sorts the tokens of a shard and attends among them. An *exchange* brings the tokens of each group of
heads to where they are attended, and the results back; `LocalExchange` moves nothing. The rest is the same for
all: autocast is off, the backward needs the output and one logsumexp per query whatever the number of rounds
(dS = P * (dP - delta), as in flash attention), and a query that met no key attends to itself, or to nothing if
values are those of the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.ops.lsh.options import AttentionOptions, WindowRule
from reformer_dist.ops.lsh.partition import Partition, choose_tiling, window_partition
from reformer_dist.ops.lsh.sorting import mark_padding


@dataclass(frozen=True)
class Shard:
    """Rows that attend to each other, with the keys that sort them in every round.

    Whole sequences: N heads of L tokens each, which are sorted head by head. Or a partition of the sorted order of
    BH heads, whose other rows are on other ranks: N = 1, and L rows in any order that keeps those of a head by
    position. In a round, a row of a partition may be a query, a key only, or absent; its softmax is partial.
    """

    sort_keys: Tensor
    """[N, R, L] integers: the bucket id; of a partition, head * K + bucket id. n_sort_keys: absent (padding)."""
    n_sort_keys: int
    head_index: Tensor
    """[N], or [L] of a partition: batch row * n_heads + head, which dropout masks depend on."""
    seq_len: int
    """Tokens of a sequence, on all ranks."""
    first_head: int = 0
    """Index of the first of the N heads among the B * H of the tensors."""
    positions: Tensor | None = None
    """[L] in the sequence; None for whole sequences."""
    position_codes: Tensor | None = None
    """[R, L] `sorting.position_codes` of a partition, with count_pairs_once."""
    bucket_sizes: Tensor | None = None
    """[BH, R, K] tokens of each bucket on all ranks; None for whole sequences."""
    partition: Partition = field(default_factory=Partition)
    has_padding: bool = True
    """Whether some rows may be absent from all rounds."""

    @property
    def is_whole(self) -> bool:
        return self.positions is None

    @property
    def n_rows(self) -> int:
        """N * L"""
        return self.sort_keys.shape[0] * self.sort_keys.shape[2]

    def query_bounds(self, rule: WindowRule) -> Tensor:
        """int32 [R, BH * K, 2]: how many rows of each bucket precede its first query, and its last one's end."""
        assert self.bucket_sizes is not None
        tile_len = choose_tiling(rule, self.seq_len, self.bucket_sizes.shape[2]).tile_len
        bounds = []
        for sizes in self.bucket_sizes.unbind(dim=1):
            run = window_partition(sizes, rule, tile_len, self.partition)
            bounds.append(torch.stack([run.query_start - run.start, run.query_stop - run.start], dim=-1))
        return torch.stack(bounds).flatten(1, 2).int()


class Forward(NamedTuple):
    """Inputs and outputs [B, H, S, D] of the forward; a partition has B = H = 1 and S = L."""

    q: Tensor
    k: Tensor | None
    """None for shared query-key attention, whose keys are q / |q|."""
    v: Tensor
    out: Tensor
    """To be filled; anything for queries that met no key."""
    lse: Tensor
    """To be filled, float32 [B, H, S]: logsumexp in base 2 over all rounds; inf for queries that met no key."""


class Backward(NamedTuple):
    """The same of the backward. lse = inf silences a query."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    d_out: Tensor
    lse: Tensor
    delta: Tensor
    """float32 [B, H, S]: rowsum(dO * o)."""
    dq: Tensor
    """Zeros, to which gradients are added; with shared keys, those of the keys too."""
    dk: Tensor | None
    """Likewise."""
    dv: Tensor
    """Likewise, but dO for queries that met no key."""


class SortedShard(Protocol):
    """A shard in the order that a backend attends in."""

    def attend(self, tensors: Forward) -> None: ...

    def attend_backward(self, tensors: Backward) -> None: ...


class Backend(Protocol):
    """One backend of attention, for the options and tensors of one pass."""

    keeps_order: bool
    """Whether the sorted shards of the forward are kept for the backward, or made anew."""

    def __init__(self, options: AttentionOptions, like: Tensor) -> None:
        """like: a tensor of the width, dtype and device of v."""
        ...

    @staticmethod
    def hash(
        vectors: Tensor, rotations: Tensor, n_buckets: int, scheme: str, factors: tuple[int, ...] | None
    ) -> Tensor:
        """Bucket ids [B, H, R, S] of vectors [B, H, S, D]: `hashing.hash_vectors`."""
        ...

    @staticmethod
    def readable(x: Tensor) -> Tensor:
        """x, or a copy with the strides that the backend reads."""
        ...

    def heads_per_group(self, n_rounds: int, seq_len: int) -> int:
        """Heads of whole sequences that are sorted and attended at a time."""
        ...

    def sort(self, shard: Shard) -> SortedShard: ...

    def row_dot(self, a: Tensor, b: Tensor) -> Tensor:
        """float32 [B, H, S]: sum over the last dimension of a * b, both [B, H, S, D]."""
        ...


class Sorter:
    """The backend of one pass, with the orders of an earlier pass if it keeps them."""

    def __init__(self, backend: Backend, orders: dict[int, SortedShard]) -> None:
        self.backend, self._orders = backend, orders

    def sort(self, shard: Shard) -> SortedShard:
        return self.backend.sort(shard)

    def sort_once(self, group: int, shard: Callable[[], Shard]) -> SortedShard:
        """The sorted shard of a group, from the earlier pass where it has been kept."""
        if group in self._orders:
            return self._orders[group]
        order = self.backend.sort(shard())
        if self.backend.keeps_order:
            self._orders[group] = order
        return order


class Exchange(Protocol):
    """Brings the tokens of each group of heads to where they are attended, and the results back."""

    options: AttentionOptions

    def forward(self, tensors: Forward, sorter: Sorter) -> None:
        """Fills out and lse of this rank's tokens."""
        ...

    def backward(self, tensors: Backward, sorter: Sorter) -> None:
        """Adds to the gradients of this rank's tokens."""
        ...


class LocalExchange:
    """Whole sequences on this rank: each group of heads is attended where it is."""

    def __init__(self, bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None) -> None:
        """bucket_ids [B, H, R, S] below options.n_buckets; key_padding_mask [B, S], True for real tokens."""
        self.bucket_ids, self.options, self.key_padding_mask = bucket_ids, options, key_padding_mask

    def forward(self, tensors: Forward, sorter: Sorter) -> None:
        for order in self._orders(sorter):
            order.attend(tensors)

    def backward(self, tensors: Backward, sorter: Sorter) -> None:
        for order in self._orders(sorter):
            order.attend_backward(tensors)

    def _orders(self, sorter: Sorter) -> Iterator[SortedShard]:
        batch, n_heads, n_rounds, seq_len = self.bucket_ids.shape
        size = sorter.backend.heads_per_group(n_rounds, seq_len)
        for group, first in enumerate(range(0, batch * n_heads, size)):
            yield sorter.sort_once(group, lambda first=first: self._shard(first, size))  # type: ignore[misc]

    def _shard(self, first: int, size: int) -> Shard:
        batch, n_heads, _, seq_len = self.bucket_ids.shape
        heads, n_buckets = slice(first, first + size), self.options.n_buckets
        sort_keys = mark_padding(self.bucket_ids, n_buckets, self.key_padding_mask)[heads]
        numbers = self.options.head_indices(batch, n_heads, self.bucket_ids.device)[heads]
        return Shard(sort_keys, n_buckets, numbers, seq_len, first, has_padding=self.key_padding_mask is not None)


def attend(q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange, backend: type[Backend]) -> Tensor:
    """[B, H, S, D] in v's dtype, for q, k, v [B, H, S, D] of this rank's tokens; k is None for shared keys."""
    out: Tensor = _Attention.apply(q, k, v, exchange, backend)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange, backend: type[Backend]
    ) -> Tensor:
        q, v = backend.readable(q), backend.readable(v)
        k = None if k is None else backend.readable(k)
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        ctx.exchange, ctx.backend, ctx.orders = exchange, backend, {}
        with torch.autocast(v.device.type, enabled=False):
            sorter = Sorter(backend(exchange.options, v), ctx.orders)
            exchange.forward(Forward(q, k, v, out, lse), sorter)
            if exchange.options.next_value_heads:
                out.masked_fill_(torch.isinf(lse).unsqueeze(3), 0)
            else:
                _select_rows(out, torch.isinf(lse), v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_out = ctx.backend.readable(grads[0])
        dq, dv = torch.zeros_like(q), torch.zeros_like(v)
        dk = None if k is None else torch.zeros_like(k)
        with torch.autocast(v.device.type, enabled=False):
            sorter = Sorter(ctx.backend(ctx.exchange.options, v), ctx.orders)
            delta = sorter.backend.row_dot(d_out, out)
            if not ctx.exchange.options.next_value_heads:
                _select_rows(dv, torch.isinf(lse), d_out)  # o = v for queries that met no key
            ctx.exchange.backward(Backward(q, k, v, d_out, lse, delta, dq, dk, dv), sorter)
        return dq, dk, dv, None, None


def _select_rows(x: Tensor, rows: Tensor, other: Tensor) -> None:
    """x[rows] = other[rows], for a mask [B, H, S]; a GPU's host does not wait for the number of rows."""
    if x.is_cuda:
        torch.where(rows.unsqueeze(3), other, x, out=x)
    else:
        x[rows] = other[rows]
