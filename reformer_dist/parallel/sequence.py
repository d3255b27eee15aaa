"""Attention over sequences that are sliced over the ranks of a mesh.

Implements `models.sequence.SequenceAccess`: head exchange first, then bucket exchange, along the axes of the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from reformer_dist.config import Precision, RunConfig
from reformer_dist.distributed.mesh import SequenceMesh, make_mesh
from reformer_dist.distributed.runtime import Runtime, ranks_per_node
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import AttentionOptions, CrossKeys, CrossOptions, attend_locally, cross_attention
from reformer_dist.ops.lsh.attention import Exchange, LocalExchange
from reformer_dist.ops.lsh.bucket_stats import BucketStats, measure_bucket_stats
from reformer_dist.ops.lsh.next_values import document_starts, next_values
from reformer_dist.ops.lsh.sorting import count_buckets, mark_padding
from reformer_dist.ops.profiling import part
from reformer_dist.parallel.bucket_exchange import BucketExchange, exchanged_attention
from reformer_dist.parallel.collectives import gather_slices, to_heads, to_slices
from reformer_dist.parallel.exchange_plan import make_plan
from reformer_dist.parallel.traffic import LayerShape, choose_mesh, describe_mesh
from reformer_dist.process.log import logger


class SlicedSequence:
    """Sequences of seq_len tokens, in equal slices over the `size` ranks of a mesh.

    If the length does not divide, the last slices end in padding, which is masked.
    """

    def __init__(self, mesh: SequenceMesh, seq_len: int, *, per_round: bool = False) -> None:
        self.mesh, self.seq_len, self._per_round = mesh, seq_len, per_round
        self.n_local = -(-seq_len // mesh.size)
        self._start = mesh.slice_index * self.n_local

    def of_length(self, seq_len: int) -> SlicedSequence:
        """The same ranks, with sequences of another length."""
        return SlicedSequence(self.mesh, seq_len, per_round=self._per_round)

    def take(self, x: Tensor, fill: float | int) -> Tensor:
        """This rank's slice [B, n_local] of whole rows x [B, seq_len], padded with `fill`."""
        part = x[:, self._start : self._start + self.n_local]
        return torch.nn.functional.pad(part, (0, self.n_local - part.shape[1]), value=fill)

    def key_padding_mask(self, batch: int, device: torch.device) -> Tensor | None:
        """[B, n_local], True for real tokens; None if the slices of all ranks are full."""
        if self.n_local * self.mesh.size == self.seq_len:
            return None
        positions = torch.arange(self._start, self._start + self.n_local, device=device)
        return (positions < self.seq_len).expand(batch, -1)

    @property
    def n_slices(self) -> int:
        return self.mesh.size

    def gather(self, x: Tensor) -> Tensor:
        return gather_slices(x, self.mesh)

    def positions(self, n_tokens: int, device: torch.device, key_padding_mask: Tensor | None = None) -> Tensor:
        """[n_tokens]; padding must follow the text. Raises ValueError unless n_tokens is n_local."""
        if n_tokens != self.n_local:
            raise ValueError(f"{n_tokens} tokens: this rank's slice of {self.seq_len} has {self.n_local}")
        # padding takes the last position, since position tables may end there
        return torch.arange(self._start, self._start + n_tokens, device=device).clamp_max(self.seq_len - 1)

    def document_starts(self, document_ids: Tensor) -> Tensor:
        last = self.preceding(document_ids[:, -1:].unsqueeze(-1), 1)
        return document_starts(document_ids, last[:, 0, 0] if self.mesh.slice_index else None)

    def preceding(self, last: Tensor, n_tokens: int) -> Tensor:
        """A part of the last tokens of all slices, so that every rank takes part in the backward of the gather."""
        tokens = gather_slices(last.contiguous(), self.mesh).transpose(0, 1).flatten(1, 2)
        start = self.mesh.slice_index * last.shape[1]
        return torch.nn.functional.pad(tokens, (0, 0, n_tokens, 0))[:, start : start + n_tokens]

    def of_layer(self, layer: int) -> SlicedSequence:
        return self

    def make_exchange(
        self,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
        query_ids: Tensor | None = None,
    ) -> Exchange:
        """A `BucketExchange`, or a `LocalExchange` if the head exchange makes sequences whole."""
        mesh, n_heads, mask = self.mesh, bucket_ids.shape[1], key_padding_mask
        options = replace(options, n_heads=n_heads, first_head=mesh.head_rank * n_heads // mesh.heads)
        if mesh.heads > 1:
            bucket_ids = self._ids_to_heads(bucket_ids)
            query_ids = None if query_ids is None else self._ids_to_heads(query_ids)
            mask, documents = (
                None if x is None else _concat_slices(mesh.head_group.all_gather(x.contiguous(), "heads"))
                for x in (mask, options.document_ids)
            )
            options = replace(options, document_ids=documents)
        if mesh.buckets == 1:
            mask, documents = (None if x is None else x[:, : self.seq_len] for x in (mask, options.document_ids))
            options = replace(options, document_ids=documents)
            query_ids = None if query_ids is None else query_ids[..., : self.seq_len]
            return LocalExchange(bucket_ids[..., : self.seq_len], options, mask, query_ids)
        buckets = mark_padding(bucket_ids, options.n_buckets, mask)
        queries = None if query_ids is None else mark_padding(query_ids, options.n_buckets, mask)
        with part("exchange"):
            comm, per_round = mesh.bucket_group, self._per_round
            plan = make_plan(buckets, options, self.seq_len, comm, query_buckets=queries, per_round=per_round)
        return BucketExchange(plan, options, mesh.bucket_group, per_round=self._per_round)

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        mesh, order = self.mesh, list(range(self.mesh.heads))
        v = self._next_values(v, exchange.options.next_value_heads)
        if mesh.heads > 1:
            # one by one: each exchange frees its copies before the next
            q, v = to_heads(q, mesh.head_group, order), to_heads(v, mesh.head_group, order)
            k = None if k is None else to_heads(k, mesh.head_group, order)
        if isinstance(exchange, BucketExchange):
            out = exchanged_attention(q, k, v, exchange)
        else:
            assert isinstance(exchange, LocalExchange)
            with mesh.stats.timed("attend"):
                q, v = self._without_padding(q), self._without_padding(v)
                k = None if k is None else self._without_padding(k)
                out = self._with_padding(attend_locally(q, k, v, exchange), mesh.heads)
        return to_slices(out, mesh.head_group, order) if mesh.heads > 1 else out

    def _ids_to_heads(self, ids: Tensor) -> Tensor:
        """[B, H, R, S] -> [B, H / P, R, P * S], by the head exchange."""
        order = list(range(self.mesh.heads))
        return to_heads(ids.transpose(2, 3), self.mesh.head_group, order).transpose(2, 3).contiguous()

    def _next_values(self, v: Tensor, n_heads: int) -> Tensor:
        if n_heads == 0:
            return v
        next_slice = self.mesh.slice_index + 1
        # times 0 on the last rank, which takes part in the backward of the gather like all others
        firsts = gather_slices(v[:, :n_heads, 0], self.mesh)
        return next_values(v, n_heads, firsts[next_slice % self.mesh.size] * (next_slice < self.mesh.size))

    def exact_attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: ExactOptions, key_padding_mask: Tensor | None
    ) -> Tensor:
        comm, n_heads = self.mesh.sequence_group, q.shape[1]
        q, k, v = (self._to_whole_sequences(x) for x in (q, k, v))
        mask = self._whole_rows(key_padding_mask)
        options = replace(options, document_ids=self._whole_rows(options.document_ids))
        first_head = comm.index * n_heads // comm.size
        out = options.attend(q, k, v, mask, first_head=first_head, n_heads=n_heads)
        return to_slices(self._with_padding(out, self.mesh.size), comm, self._order)

    def cross_attention(
        self,
        q: Tensor,
        query_ids: Tensor | None,
        keys: Callable[[], CrossKeys],
        options: CrossOptions,
        sequence_of_keys: object,
    ) -> Tensor:
        if not isinstance(sequence_of_keys, SlicedSequence):
            raise ValueError("source_sequence: must be a slice of the sources, as `sequence` is of the targets")
        comm, n_heads, source = self.mesh.sequence_group, q.shape[1], sequence_of_keys
        local = keys()
        whole = CrossKeys(
            source._to_whole_sequences(local.k),
            source._to_whole_sequences(local.v),
            source._whole_sequence_ids(local.ids),
            source._whole_rows(local.padding_mask),
        )
        q, query_ids = self._to_whole_sequences(q), self._whole_sequence_ids(query_ids)
        options = replace(options, n_heads=n_heads, first_head=comm.index * n_heads // comm.size)
        with self.mesh.stats.timed("attend"):
            out = cross_attention(q, query_ids, whole, options)
        return to_slices(self._with_padding(out, self.mesh.size), comm, self._order)

    def bucket_stats(self, bucket_ids: Tensor, n_buckets: int, window: int) -> BucketStats:
        counts = count_buckets(bucket_ids.flatten(0, 1), n_buckets)
        counts = self.mesh.sequence_group.all_reduce(counts, "bucket_stats")
        return measure_bucket_stats(bucket_ids, counts, window)

    @property
    def _order(self) -> list[int]:
        """The rank that holds each slice."""
        return [self.mesh.rank_of_slice(index) for index in range(self.mesh.size)]

    def _to_whole_sequences(self, x: Tensor) -> Tensor:
        """[B, H, n_local, ...] -> [B, H / P, seq_len, ...]: all tokens, 1 / P of the heads."""
        return self._without_padding(to_heads(x, self.mesh.sequence_group, self._order))

    def _whole_sequence_ids(self, ids: Tensor | None) -> Tensor | None:
        """[B, H, R, n_local] -> [B, H / P, R, seq_len]."""
        return None if ids is None else self._to_whole_sequences(ids.transpose(2, 3)).transpose(2, 3)

    def _whole_rows(self, x: Tensor | None) -> Tensor | None:
        """[B, n_local] -> [B, seq_len]."""
        if x is None:
            return None
        slices = self.mesh.sequence_group.all_gather(x.contiguous(), "heads")[self._order]
        return _concat_slices(slices)[:, : self.seq_len]

    def _without_padding(self, x: Tensor) -> Tensor:
        return x if x.shape[2] == self.seq_len else x[:, :, : self.seq_len]

    def _with_padding(self, out: Tensor, n_slices: int) -> Tensor:
        if out.shape[2] == n_slices * self.n_local:
            return out
        return torch.nn.functional.pad(out, (0, 0, 0, n_slices * self.n_local - out.shape[2]))


def _concat_slices(slices: Tensor) -> Tensor:
    """[P, B, n_local] -> [B, P * n_local]."""
    return slices.transpose(0, 1).flatten(1)


def make_sequence(
    config: RunConfig, runtime: Runtime, micro_batch: int, mesh: SequenceMesh | None = None
) -> SlicedSequence:
    """Slices sequences over the ranks of the configured mesh, or of the one of least traffic.

    All ranks must call it, since it creates process groups, unless `mesh`, that of an earlier call, has the shape
    that is needed. Raises ConfigError if the ranks do not divide.
    """
    config.dp_size(runtime.world_size)
    parallel, model = config.parallel, config.model
    shape = LayerShape(
        rows=micro_batch,
        slice_len=-(-config.data.seq_len // parallel.sequence),
        n_heads=model.n_heads,
        head_dim=model.resolved_head_dim,
        n_hashes=model.n_hashes + model.local_round,
        n_buckets=model.n_buckets,
        element_size=4 if config.trainer.precision is Precision.fp32 else 2,
        own_keys=not model.shared_qk,
    )
    heads, buckets = choose_mesh(parallel.meshes(), shape, ranks_per_node())
    if parallel.sequence > 1:
        logger.info(describe_mesh(heads, buckets, shape))
    if mesh is None or (mesh.heads, mesh.buckets) != (heads, buckets):
        mesh = make_mesh(runtime, heads, buckets, overlaps=parallel.overlap)
    return SlicedSequence(mesh, config.data.seq_len, per_round=not parallel.merges_rounds)
