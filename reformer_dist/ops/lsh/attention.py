"""LSH and local attention as one autograd function, for all backends and on any number of ranks.

A *backend* sorts the tokens of a shard and attends among them. An *exchange* dispatches the tokens of each group
of heads to the ranks that attend to them and combines the results; `LocalExchange` communicates nothing. The
autograd function does the rest: it disables autocast, saves the output and one logsumexp per query whatever the
number of rounds (dS = P * (dP - delta), as in flash attention), and lets a query that met no key attend to itself,
or to nothing if values are those of the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_document_ids, check_integer
from reformer_dist.ops.first_order import FirstOrderFunction, first_order
from reformer_dist.ops.lsh.neighbour_rules import Rule, WindowRule
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.partition import Partition, choose_tiling, window_partition
from reformer_dist.ops.lsh.sorting import mark_padding
from reformer_dist.ops.profiling import part


@dataclass(frozen=True)
class Shard:
    """Rows that attend to each other, with the keys that sort them in every round.

    Either whole sequences: N heads of L tokens each, which are sorted head by head. Or a partition of the sorted
    order of BH heads, whose other rows are on other ranks: N = 1, and L rows in any order that keeps those of a
    head sorted by position. In a round, a row of a partition is a query, a key only, or absent.
    """

    sort_keys: Tensor
    """[N, R, L] bucket ids, or of a partition head * K + bucket id; n_sort_keys marks absent rows (padding)."""
    n_sort_keys: int
    head_index: Tensor | None
    """[N], or [L] of a partition: batch row * n_heads + head in the step, which dropout masks depend on.

    None for whole sequences without dropout.
    """
    seq_len: int
    """Tokens of a sequence, on all ranks."""
    first_head: int = 0
    """Index of the first of the N heads within the B * H heads of the tensors."""
    query_sort_keys: Tensor | None = None
    """[N, R, L] as sort_keys, of the rows as queries, if buckets of keys are their own. None: one for both."""
    positions: Tensor | None = None
    """[L] positions in the sequence; None for whole sequences."""
    position_codes: Tensor | None = None
    """[R, L] `sorting.position_codes` of a partition, with count_pairs_once."""
    query_codes: Tensor | None = None
    """[R, L] likewise, of the rows as queries, if buckets of keys are their own."""
    bucket_sizes: Tensor | None = None
    """[BH, R, K] tokens of each bucket on all ranks; None for whole sequences."""
    partition: Partition = field(default_factory=Partition)
    has_padding: bool = True
    """Whether some rows may be absent from all rounds."""
    document_ids: Tensor | None = None
    """int32 [N, L]: rows of different documents do not attend to each other. Since those of a document are
    adjacent in a sequence, they also are within each bucket, and the order by (bucket, position) serves all."""

    @property
    def is_whole(self) -> bool:
        return self.positions is None

    @property
    def n_rows(self) -> int:
        """N * L"""
        return self.sort_keys.shape[0] * self.sort_keys.shape[2]

    def query_bounds(self, rule: WindowRule) -> Tensor:
        """First query and one past the last within each bucket of a partition: int32 [R, BH * K, 2]."""
        assert self.bucket_sizes is not None
        tile_len = choose_tiling(rule, self.seq_len, self.bucket_sizes.shape[2]).tile_len
        bounds = []
        for sizes in self.bucket_sizes.unbind(dim=1):
            part = window_partition(sizes, rule, tile_len, self.partition)
            bounds.append(torch.stack([part.query_start - part.start, part.query_stop - part.start], dim=-1))
        return torch.stack(bounds).flatten(1, 2).int()


class ForwardTensors(NamedTuple):
    """Inputs and outputs [B, H, S, D] of the forward; a partition has B = H = 1 and S = L."""

    q: Tensor
    k: Tensor | None
    """None for shared query-key attention, whose keys are q / |q|."""
    v: Tensor
    out: Tensor
    """To be filled; undefined for queries that met no key, unless the backend `fills_lone_rows`."""
    lse: Tensor
    """To be filled, float32 [B, H, S]: logsumexp in base 2 over all rounds; inf for queries that met no key."""


class BackwardTensors(NamedTuple):
    """Inputs and outputs [B, H, S, D] of the backward. lse is +inf to exclude a query: p = 2^(s - lse) = 0."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    d_out: Tensor
    lse: Tensor
    delta: Tensor | None
    """float32 [B, H, S]: rowsum(dO * o). None for whole sequences if the backend `fills_lone_rows`."""
    dq: Tensor
    """Zeros, to which the gradients are added; with shared keys, including those of the keys.

    If the backend `fills_lone_rows`, the gradients of whole sequences are undefined before.
    """
    dk: Tensor | None
    dv: Tensor
    """Zeros, or for whole sequences dO of queries that met no key and attend to themselves."""
    out: Tensor | None = None
    """The output of the forward, at least where delta is None."""


@dataclass(frozen=True)
class WorkspaceShape:
    """Sizes of an attention call, which determine the working memory of a backend."""

    n_heads: int
    """(Batch row, head) pairs."""
    seq_len: int
    """Tokens of a sequence, on all ranks."""
    n_rounds: int
    n_buckets: int
    head_dim: int
    element_size: int
    """Bytes per element: 4 in float32, 2 in half precision."""
    rule: Rule
    shared_keys: bool
    count_pairs_once: bool
    dropout: bool
    device: str
    """cpu or cuda."""
    own_keys: bool = False
    """Keys have buckets of their own."""
    documents: bool = False
    """Rows hold several documents, which do not see one another."""
    n_partition_rows: float | None = None
    """Expected rows of a partition of the sorted order; None for whole sequences."""

    @property
    def has_codes(self) -> bool:
        """Whether position codes are needed."""
        return self.count_pairs_once and self.n_rounds > 1


class SortedShard(Protocol):
    """A shard in the sorted order of a backend."""

    def attend(self, tensors: ForwardTensors) -> None: ...

    def attend_backward(self, tensors: BackwardTensors) -> None: ...


class Backend(Protocol):
    """One way to compute attention. An instance serves one pass, forward or backward, of a call."""

    keeps_order: bool
    """Whether the backward reuses the sorted shards of the forward, instead of sorting again."""
    fills_lone_rows: bool
    """Whether whole sequences are completed by the backend: it writes v or 0 to out for queries that met no key
    (`AttentionOptions.attends_alone`), adds their dO to dv, writes every gradient, and computes delta from out."""

    def __init__(self, options: AttentionOptions, like: Tensor) -> None:
        """like: a tensor with the width, dtype and device of v."""
        ...

    @staticmethod
    def hash(
        vectors: Tensor, rotations: Tensor, n_buckets: int, scheme: str, factors: tuple[int, ...] | None
    ) -> Tensor:
        """Bucket ids [B, H, R, S] of vectors [B, H, S, D]: `hashing.hash_vectors`."""
        ...

    @staticmethod
    def with_supported_strides(x: Tensor) -> Tensor:
        """x, or a copy with the strides that the backend reads."""
        ...

    @staticmethod
    def workspace_bytes(shape: WorkspaceShape) -> float:
        """Peak bytes in the backward, beyond inputs and outputs; for a partition, with its rows' gradients."""
        ...

    def heads_per_group(self, n_rounds: int, seq_len: int) -> int:
        """Heads of whole sequences that are sorted and attended at a time."""
        ...

    def sort(self, shard: Shard) -> SortedShard: ...

    def row_dot(self, a: Tensor, b: Tensor) -> Tensor:
        """float32 [B, H, S]: sum over the last dimension of a * b, both [B, H, S, D]."""
        ...


class Sorter:
    """Sorts shards by a backend, and caches them by group of heads if the backend keeps the order."""

    def __init__(self, backend: Backend, cache: dict[int, SortedShard]) -> None:
        self.backend, self._cache = backend, cache

    def sort(self, shard: Shard) -> SortedShard:
        with part("sort"):
            return self.backend.sort(shard)

    def sort_once(self, group: int, shard: Callable[[], Shard]) -> SortedShard:
        """The sorted shard of a group, cached by the earlier pass."""
        if group in self._cache:
            return self._cache[group]
        with part("sort"):
            sorted_shard = self.backend.sort(shard())
        if self.backend.keeps_order:
            self._cache[group] = sorted_shard
        return sorted_shard


class Exchange(Protocol):
    """Dispatches the tokens of each group of heads to the ranks that attend to them, and combines the results."""

    options: AttentionOptions

    def forward(self, tensors: ForwardTensors, sorter: Sorter) -> None:
        """Fills out and lse of this rank's tokens."""
        ...

    def backward(self, tensors: BackwardTensors, sorter: Sorter) -> None:
        """Adds to the gradients of this rank's tokens."""
        ...


class LocalExchange:
    """Whole sequences on this rank: no communication."""

    def __init__(
        self,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
        query_ids: Tensor | None = None,
    ) -> None:
        """bucket_ids [B, H, R, S] below options.n_buckets; key_padding_mask [B, S], True for real tokens.

        query_ids: buckets of the queries, like bucket_ids, which are then those of the keys (options.own_keys).
        Raises ValueError for other shapes, dtypes or devices, and unless options.rows is [B].
        """
        checks = TensorChecks()
        checks.integers("bucket_ids", bucket_ids, "B H R S")
        if (query_ids is not None) != options.own_keys:
            given = "None" if query_ids is None else "a tensor"
            raise ValueError(f"query_ids={given}: must be given if own_keys=True, and only then")
        if query_ids is not None:
            checks.integers("query_ids", query_ids, "B H R S")
        checks.mask("key_padding_mask", key_padding_mask, "B S")
        options.check_rows(checks)
        if options.document_ids is not None:
            check_document_ids(checks, options.document_ids)
        n_heads = bucket_ids.shape[1]
        check_integer("next_value_heads", options.next_value_heads, least=0, most=options.n_heads or n_heads)
        if options.n_heads is not None:
            check_integer("n_heads", options.n_heads, least=options.first_head + n_heads)
        self.bucket_ids, self.options, self.key_padding_mask = bucket_ids, options, key_padding_mask
        self.query_ids = query_ids

    def check(self, q: Tensor, k: Tensor | None, v: Tensor) -> None:
        """Raises ValueError unless q, k, v are [B, H, S, D] of one dtype, on one device, like the bucket ids."""
        checks = TensorChecks()
        checks.floats("q", q, "B H S D")
        if k is not None:
            checks.floats("k", k, "B H S D")
        checks.floats("v", v, "B H S D")
        checks.integers("bucket_ids", self.bucket_ids, "B H R S")

    def forward(self, tensors: ForwardTensors, sorter: Sorter) -> None:
        for shard in self._sorted_shards(sorter):
            shard.attend(tensors)

    def backward(self, tensors: BackwardTensors, sorter: Sorter) -> None:
        for shard in self._sorted_shards(sorter):
            shard.attend_backward(tensors)

    def _sorted_shards(self, sorter: Sorter) -> Iterator[SortedShard]:
        batch, n_heads, n_rounds, seq_len = self.bucket_ids.shape
        size = sorter.backend.heads_per_group(n_rounds, seq_len)
        for group, first in enumerate(range(0, batch * n_heads, size)):
            yield sorter.sort_once(group, lambda first=first: self._shard(first, size))  # type: ignore[misc]

    def _shard(self, first: int, size: int) -> Shard:
        (batch, n_heads, _, seq_len), n_buckets = self.bucket_ids.shape, self.options.n_buckets
        heads, mask = slice(first, min(first + size, batch * n_heads)), self.key_padding_mask
        documents = self.options.document_ids
        if mask is not None or documents is not None:
            row = torch.arange(heads.start, heads.stop, device=self.bucket_ids.device) // n_heads
            mask, documents = (None if x is None else x[row] for x in (mask, documents))
        keys, queries = (
            None if ids is None else mark_padding(ids.flatten(0, 1)[heads].unsqueeze(1), n_buckets, mask)
            for ids in (self.bucket_ids, self.query_ids)
        )
        assert keys is not None
        head_index = None
        if self.options.dropout > 0:
            head_index = self.options.head_indices(batch, n_heads, keys.device)
        return Shard(
            sort_keys=keys,
            n_sort_keys=n_buckets,
            head_index=None if head_index is None else head_index[heads],
            query_sort_keys=queries,
            seq_len=seq_len,
            first_head=first,
            has_padding=mask is not None,
            document_ids=None if documents is None else documents.int(),
        )


def attend(q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange, backend: type[Backend]) -> Tensor:
    """[B, H, S, D] in v's dtype, for q, k, v [B, H, S, D] of this rank's tokens; k is None for shared keys."""
    out: Tensor = _Attention.apply(q, k, v, exchange, backend)
    return out


class _Attention(FirstOrderFunction):
    what = "LSH and local attention"
    way_out = (
        "set model.attention_backend=reference and model.recompute=none (with lsh_attention, backend='reference')"
    )

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange, backend: type[Backend]
    ) -> Tensor:
        q, v = backend.with_supported_strides(q), backend.with_supported_strides(v)
        k = None if k is None else backend.with_supported_strides(k)
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        ctx.exchange, ctx.backend, ctx.cache = exchange, backend, {}
        with torch.autocast(v.device.type, enabled=False), part("attend"):
            sorter = Sorter(backend(exchange.options, v), ctx.cache)
            exchange.forward(ForwardTensors(q, k, v, out, lse), sorter)
            if _is_completed(exchange, backend):
                pass
            elif exchange.options.attends_alone:
                _select_rows(out, torch.isinf(lse), v)  # o = v for queries that met no key
            else:
                out.masked_fill_(torch.isinf(lse).unsqueeze(3), 0)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_out = ctx.backend.with_supported_strides(grads[0])
        is_completed = _is_completed(ctx.exchange, ctx.backend)
        create = torch.empty_like if is_completed else torch.zeros_like
        dq, dk, dv = create(q), None if k is None else create(k), create(v)
        with torch.autocast(v.device.type, enabled=False), part("attend"):
            sorter = Sorter(ctx.backend(ctx.exchange.options, v), ctx.cache)
            delta = None if is_completed else sorter.backend.row_dot(d_out, out)
            if ctx.exchange.options.attends_alone and not is_completed:
                _select_rows(dv, torch.isinf(lse), d_out)
            ctx.exchange.backward(BackwardTensors(q, k, v, d_out, lse, delta, dq, dk, dv, out), sorter)
        return dq, dk, dv, None, None


def _is_completed(exchange: Exchange, backend: type[Backend]) -> bool:
    """Whether the backend itself takes care of queries that met no key, which it knows of whole sequences only."""
    return backend.fills_lone_rows and isinstance(exchange, LocalExchange)


def _select_rows(x: Tensor, rows: Tensor, other: Tensor) -> None:
    """x[rows] = other[rows] for a mask [B, H, S], without host synchronization on a GPU."""
    if x.is_cuda:
        torch.where(rows.unsqueeze(3), other, x, out=x)
    else:
        index = rows.nonzero(as_tuple=True)
        x[index] = other[index]
