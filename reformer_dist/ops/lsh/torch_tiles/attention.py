"""Attention over LSH neighbourhoods in plain PyTorch: one rank that holds whole sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.attention import Grads, Inputs
from reformer_dist.ops.lsh.held import Rows
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.partition import Partition
from reformer_dist.ops.lsh.sorting import count_buckets, full_position_codes, mark_padding, row_sort_keys
from reformer_dist.ops.lsh.torch_tiles.held import TiledRows
from reformer_dist.ops.lsh.torch_tiles.layout import Layout, build_layouts
from reformer_dist.ops.workspace import Workspace

# Tokens whose sorted copies exist at a time: they fit the caches of a core.
GROUP_TOKENS = {"cpu": 2**14, "cuda": 2**20}


class TiledAttention:
    """`whole.WholeAttention` in plain PyTorch, on any device and under both rules, in O(R * S * window) time."""

    def __init__(self, bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None) -> None:
        """bucket_ids [B, H, R, S] below options.n_buckets, key_padding_mask [B, S]."""
        self._call = (bucket_ids, options, key_padding_mask)

    def readable(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor, out: Tensor, lse: Tensor) -> None:
        for part in _parts(*self._call):
            o, part_lse = part.rows.attend(part.of(q), None if k is None else part.of(k), part.of(v))
            part.of(out).copy_(o)
            lse.view(-1)[part.tokens] = part_lse

    def attend_backward(self, inputs: Inputs, out: Tensor, lse: Tensor, grads: Grads) -> None:
        for part in _parts(*self._call):
            q, k, v, d_out = (None if x is None else part.of(x) for x in inputs)
            assert q is not None and v is not None and d_out is not None
            part_lse = lse.view(-1)[part.tokens]
            delta = (d_out.float() * part.of(out).float()).sum(dim=1)
            dq, dk, dv = part.rows.attend_backward(q, k, v, d_out, lse=part_lse, delta=delta)
            # who met nobody has o = v
            dv.addcmul_(d_out.float(), torch.isinf(part_lse).float().unsqueeze(1))
            for whole, found in zip(grads, (dq, dk, dv), strict=True):
                if whole is not None and found is not None:
                    part.of(whole).copy_(found)


@dataclass(frozen=True)
class _Part:
    """Some consecutive (batch, head) units."""

    tokens: slice
    """Of the flat tensors [B * H * S, D]."""
    rows: TiledRows

    def of(self, x: Tensor) -> Tensor:
        """This part's rows of x [B, H, S, D]."""
        return x.view(-1, x.shape[-1])[self.tokens]


def _parts(bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None) -> Iterator[_Part]:
    batch, n_heads, _, seq_len = bucket_ids.shape
    numbers = options.head_indices(batch, n_heads, bucket_ids.device)
    buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)
    size = max(1, GROUP_TOKENS["cuda" if bucket_ids.is_cuda else "cpu"] // seq_len)
    scratch = Workspace(bucket_ids.device)
    for first in range(0, buckets.shape[0], size):
        part = buckets[first : first + size]
        unit, position = _unit_and_position(part)
        rows = Rows(numbers[unit + first], position, _codes(part, options))
        tiled = TiledRows(rows, lay_out(part, options), options, scratch)
        yield _Part(slice(first * seq_len, (first + part.shape[0]) * seq_len), tiled)


def _unit_and_position(buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the unit, from 0, and position of each row of [BH, R, S]."""
    n_units, _, seq_len = buckets.shape
    row = torch.arange(n_units * seq_len, device=buckets.device)
    return row // seq_len, row % seq_len


def lay_out(buckets: Tensor, options: AttentionOptions) -> list[Layout]:
    """Layouts of the rounds of bucket ids [BH, R, S], where n_buckets marks padding; rows are unit by unit."""
    n_units, n_rounds, seq_len = buckets.shape
    unit, _ = _unit_and_position(buckets)
    n_buckets = options.n_buckets
    keys = [row_sort_keys(unit, buckets[:, r].flatten(), n_units, n_buckets) for r in range(n_rounds)]
    return build_layouts(keys, count_buckets(buckets, n_buckets), seq_len, options, Partition())


def _codes(buckets: Tensor, options: AttentionOptions) -> Tensor | None:
    """Codes [R, rows] by which pairs that meet in several rounds are found, if they are to be counted once."""
    if not options.count_pairs_once or buckets.shape[1] == 1:
        return None
    return full_position_codes(buckets, options.n_buckets, options.rule).flatten(1)
