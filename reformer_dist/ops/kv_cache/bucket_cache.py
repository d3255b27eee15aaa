"""LSH attention for one more token: it looks at the last members of its bucket in each round, and at no others.

Keys and values of all tokens lie in one pool that is only appended to. For each (row, head, round, bucket) a ring
holds the places in the pool of the bucket's last `window - 1` members. So a token touches
rounds * (window - 1) places a head, however long the text is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_dist.ops.kv_cache.growable_tensor import GrowableTensor
from reformer_dist.ops.lsh.options import AttentionOptions, WindowRule
from reformer_dist.ops.lsh.shared_keys import shared_keys
from reformer_dist.ops.lsh.sorting import bucket_ranks, count_buckets, mark_padding


class BucketCache:
    """Shared query-key attention under the causal window rule."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
    ) -> None:
        """From a prompt: q, v [B, H, S, D], bucket_ids [B, H, R, S], key_padding_mask [B, S]."""
        rule = options.rule
        assert isinstance(rule, WindowRule) and rule.causal and not rule.sees_self
        self._scale = options.scale
        self._counts_once = options.count_pairs_once and bucket_ids.shape[2] > 1
        self._length = rule.window - 1  # of a ring
        # [places, H, 2 D]: key and value of a token lie together, since they are read together
        self._pool = GrowableTensor(_entries(q, v), dim=0)
        buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)
        counts = count_buckets(buckets, options.n_buckets)
        rings = _fill_rings(buckets, counts, self._length, n_heads=q.shape[1])
        shape = (*bucket_ids.shape[:3], options.n_buckets)
        self._counts, self._rings = counts.view(shape), rings.view(*shape, self._length)

    def attend(self, q: Tensor, v: Tensor, bucket_ids: Tensor) -> Tensor:
        """Outputs [B, H, 1, D] of the next token, in v's dtype; it is remembered. bucket_ids [B, H, R, 1]."""
        if self._length == 0:
            return v  # with a window of 1 nobody meets anybody
        ring = self._ring_of(bucket_ids)
        count = self._counts.view(-1)[ring]
        members = self._rings.view(-1, self._length)[ring]
        is_member = torch.arange(self._length, device=q.device) < count.unsqueeze(-1)
        with torch.autocast(q.device.type, enabled=False):
            out = self._attend(q, v, members.flatten(2), is_member.flatten(2))
            self._pool.append(_entries(q, v))
        newest = torch.arange(self._pool.size - q.shape[0], self._pool.size, device=q.device, dtype=torch.int32)
        places = ring * self._length + count % self._length
        self._rings.view(-1)[places] = newest[:, None, None].expand_as(places)
        self._counts.view(-1)[ring] = count + 1
        return out

    def _ring_of(self, bucket_ids: Tensor) -> Tensor:
        """Numbers [B, H, R] of the rings of the buckets [B, H, R, 1]."""
        n_buckets = self._counts.shape[3]
        first = torch.arange(0, self._counts.numel(), n_buckets, device=bucket_ids.device)
        return first.view(self._counts.shape[:3]) + bucket_ids[..., 0].long()

    def _attend(self, q: Tensor, v: Tensor, members: Tensor, is_member: Tensor) -> Tensor:
        """members [B, H, M]: places in the pool, of which those of is_member [B, H, M] count."""
        n_heads, head_dim = q.shape[1], q.shape[3]
        rows = members.long() * n_heads + torch.arange(n_heads, device=q.device).unsqueeze(1)
        pool = self._pool.filled.view(-1, 2 * head_dim)
        entries = pool.index_select(0, rows.flatten()).view(*rows.shape, 2 * head_dim)
        k, values = entries.float().split(head_dim, dim=-1)
        scores = self._scale * (k @ q.float().transpose(-1, -2)).squeeze(-1)
        if self._counts_once:
            scores -= _meetings(members, is_member).log()
        is_alone = ~is_member.any(dim=-1)
        scores.masked_fill_(~is_member, -torch.inf).masked_fill_(is_alone.unsqueeze(-1), 0.0)
        out = scores.softmax(-1).unsqueeze(2) @ values
        return torch.where(is_alone[..., None, None], v.float(), out).to(v.dtype)

    def select_rows(self, rows: Tensor) -> None:
        # the pool stays: rows that go on from one text share what it holds
        self._counts, self._rings = self._counts[rows], self._rings[rows]

    def n_bytes(self) -> int:
        return self._pool.n_bytes() + self._counts.nbytes + self._rings.nbytes


def _entries(q: Tensor, v: Tensor) -> Tensor:
    """What the pool holds of tokens [B, H, S, D]: [B * S, H, 2 D]."""
    return torch.cat([shared_keys(q), v], dim=-1).transpose(1, 2).flatten(0, 1)


def _fill_rings(buckets: Tensor, counts: Tensor, length: int, n_heads: int) -> Tensor:
    """Rings int32 [BH, R, K, length] of a prompt's bucket ids [BH, R, S], where K marks padding."""
    n_units, n_rounds, seq_len = buckets.shape
    n_buckets = counts.shape[2]
    rings = torch.zeros(n_units, n_rounds, n_buckets, length, dtype=torch.int32, device=buckets.device)
    nobody = torch.zeros_like(counts[:, 0])
    for round_ in range(n_rounds if length > 0 else 0):
        bucket = buckets[:, round_].long()
        rank = bucket_ranks(bucket, nobody)
        total = torch.nn.functional.pad(counts[:, round_], (0, 1)).gather(1, bucket)  # 0 for padding
        unit, token = (rank >= (total - length).clamp_min(0)).logical_and(rank < total).nonzero(as_tuple=True)
        place = (unit // n_heads) * seq_len + token
        rings[unit, round_, bucket[unit, token], rank[unit, token] % length] = place.to(torch.int32)
    return rings


def _meetings(members: Tensor, is_member: Tensor) -> Tensor:
    """In how many rounds each of members [B, H, M] is met: at least 1."""
    is_same = members.unsqueeze(-1) == members.unsqueeze(-2)
    return (is_same & is_member.unsqueeze(-2)).sum(dim=-1).clamp_min(1)
