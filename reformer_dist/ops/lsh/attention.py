"""Attention over LSH neighbourhoods in plain PyTorch: one rank that holds whole sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.ops.lsh.layout import Layout, lay_out_rows, row_keys
from reformer_dist.ops.lsh.order import count_buckets, mark_padding, whole_codes
from reformer_dist.ops.lsh.pair_mask import Rows
from reformer_dist.ops.lsh.rules import AttentionOptions
from reformer_dist.ops.lsh.runs import Part
from reformer_dist.ops.lsh.tiled_rows import TiledRows
from reformer_dist.ops.workspace import Workspace

# Tokens whose sorted copies exist at a time: they fit the caches of a core.
GROUP_TOKENS = {"cpu": 2**14, "cuda": 2**20}


def bucket_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    bucket_ids: Tensor,
    options: AttentionOptions,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Softmax over the union of what each token meets in its rounds (paper, eq. 2 to 4).

    q, k, v [B, H, S, D] -> [B, H, S, D] in v's dtype; k is None for shared query-key attention, whose keys are
    q / |q|. bucket_ids [B, H, R, S] integers below options.n_buckets; key_padding_mask [B, S], True for real
    tokens. A token that meets nobody attends to itself. The same function as `reference_attention`, in
    O(R * S * window) time.
    """
    out: Tensor = _BucketAttention.apply(q, k, v, bucket_ids, options, key_padding_mask)
    return out


class _BucketAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        q, v = q.contiguous(), v.contiguous()
        k = None if k is None else k.contiguous()
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        with torch.autocast(v.device.type, enabled=False):
            for part in _parts(bucket_ids, options, key_padding_mask):
                k_rows = None if k is None else part.of(k)
                o, part_lse = part.rows.attend(part.of(q), k_rows, part.of(v))
                part.of(out).copy_(o)
                lse.view(-1)[part.tokens] = part_lse
        ctx.save_for_backward(q, k, v, bucket_ids, out, lse, key_padding_mask)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bucket_ids, out, lse, key_padding_mask = ctx.saved_tensors
        d_out = grads[0].contiguous()
        dq, dv = torch.empty_like(q), torch.empty_like(v)
        dk = None if k is None else torch.empty_like(k)
        with torch.autocast(v.device.type, enabled=False):
            for part in _parts(bucket_ids, ctx.options, key_padding_mask):
                do_rows, part_lse = part.of(d_out), lse.view(-1)[part.tokens]
                delta = (do_rows.float() * part.of(out).float()).sum(dim=1)
                rows = (part.of(q), None if k is None else part.of(k), part.of(v), do_rows)
                dq_rows, dk_rows, dv_rows = part.rows.attend_backward(*rows, lse=part_lse, delta=delta)
                part.of(dq).copy_(dq_rows)
                if dk is not None and dk_rows is not None:
                    part.of(dk).copy_(dk_rows)
                # who met nobody has o = v
                part.of(dv).copy_(dv_rows.addcmul_(do_rows.float(), torch.isinf(part_lse).float().unsqueeze(1)))
        return dq, dk, dv, None, None, None


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
    numbers = options.unit_numbers(batch, n_heads, bucket_ids.device)
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
    """Number of the unit, from 0, and position of each row of [U, R, S]."""
    n_units, _, seq_len = buckets.shape
    row = torch.arange(n_units * seq_len, device=buckets.device)
    return row // seq_len, row % seq_len


def lay_out(buckets: Tensor, options: AttentionOptions) -> list[Layout]:
    """Layouts of the rounds of bucket ids [U, R, S], where n_buckets marks padding; rows are unit by unit."""
    n_units, n_rounds, seq_len = buckets.shape
    unit, _ = _unit_and_position(buckets)
    n_buckets = options.n_buckets
    keys = [row_keys(unit, buckets[:, r].flatten(), n_units, n_buckets) for r in range(n_rounds)]
    return lay_out_rows(keys, count_buckets(buckets, n_buckets), seq_len, options, Part())


def _codes(buckets: Tensor, options: AttentionOptions) -> Tensor | None:
    """Codes [R, rows] by which pairs that meet in several rounds are found, if they are to be counted once."""
    if not options.count_pairs_once or buckets.shape[1] == 1:
        return None
    return whole_codes(buckets, options.n_buckets, options.rule).flatten(1)
