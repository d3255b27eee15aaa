"""KV cache of LSH attention: a token attends to the last members of its bucket in each round.

An append-only pool holds keys and values of all tokens. For each (row, head, round, bucket), a ring buffer holds
the pool slots of the bucket's last `window - 1` members, or `window` keys if their buckets are their own. A token
thus reads rounds * window slots per head at most, at any context length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_range
from reformer_dist.ops.kv_cache.checks import check_rows, check_token
from reformer_dist.ops.kv_cache.growable_tensor import GrowableTensor
from reformer_dist.ops.lsh.attention import LocalExchange
from reformer_dist.ops.lsh.neighbour_rules import WindowRule
from reformer_dist.ops.lsh.next_values import next_values
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.shared_keys import shared_keys
from reformer_dist.ops.lsh.sorting import count_buckets, indices_in_bucket, mark_padding


class BucketCache:
    """LSH attention under the causal window rule, with a shared query-key or keys of their own."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
        *,
        k: Tensor | None = None,
    ) -> None:
        """From a prompt: q, v [B, H, S, D], bucket_ids [B, H, R, S], key_padding_mask [B, S].

        k [B, H, S, D]: with options.own_keys, whose bucket ids are then given. Raises ValueError.
        """
        rule = options.rule
        if not (isinstance(rule, WindowRule) and rule.causal and (options.own_keys or not rule.sees_self)):
            raise ValueError(f"rule={rule}: must be a causal WindowRule with sees_self=False")
        query_ids = bucket_ids if options.own_keys else None
        LocalExchange(bucket_ids, options, key_padding_mask, query_ids).check(q, k, v)
        k = _keys(q, k, options.own_keys)
        check_range("bucket_ids", bucket_ids, options.n_buckets, limit="n_buckets")
        self._scale = options.scale
        self._counts_once = options.count_pairs_once and bucket_ids.shape[2] > 1
        self._own_keys = options.own_keys
        self._ring_size = rule.window if options.own_keys else rule.window - 1
        self._next_value_heads, self._attends_alone = options.next_value_heads, options.attends_alone
        # unless tokens attend to themselves, the newest one waits for the value of the next
        self._waits = not rule.sees_self
        n_cached = q.shape[2] - int(self._waits)
        self._newest = k[:, :, -1:].clone(), v[:, :, -1:].clone(), bucket_ids[..., -1:].clone()
        values = next_values(v, self._next_value_heads)[:, :, :n_cached]
        # [slots, H, 2 D]: key and value of a token are adjacent, since they are read together
        self._pool = GrowableTensor(_entries(k[:, :, :n_cached], values), dim=0)
        buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)[..., :n_cached]
        counts = count_buckets(buckets, options.n_buckets)
        rings = _fill_rings(buckets, counts, self._ring_size, n_heads=q.shape[1])
        shape = (*bucket_ids.shape[:3], options.n_buckets)
        self._counts, self._rings = counts.view(shape), rings.view(*shape, self._ring_size)

    def attend(
        self,
        q: Tensor,
        v: Tensor,
        bucket_ids: Tensor,
        *,
        k: Tensor | None = None,
        query_ids: Tensor | None = None,
    ) -> Tensor:
        """Output [B, H, 1, D] of the next token, in v's dtype. bucket_ids [B, H, R, 1].

        k, query_ids: with keys of their own, where bucket_ids are those of the key. Raises ValueError.
        """
        check_token(self._newest[0], q=q, v=v)
        n_rounds, n_buckets = self._counts.shape[2:]
        checks = TensorChecks(R=n_rounds)
        checks.floats("q", q, "B H 1 D")
        checks.integers("bucket_ids", bucket_ids, "B H R 1")
        check_range("bucket_ids", bucket_ids, n_buckets, limit="n_buckets")
        if (query_ids is not None) != self._own_keys:
            given = "None" if query_ids is None else "a tensor"
            raise ValueError(f"query_ids={given}: must be given if own_keys=True, and only then")
        if query_ids is not None:
            checks.integers("query_ids", query_ids, "B H R 1")
            check_range("query_ids", query_ids, n_buckets, limit="n_buckets")
        if self._ring_size == 0:  # with a window of 1, no query has a key
            return v if self._attends_alone else torch.zeros_like(v)
        with torch.autocast(q.device.type, enabled=False):
            newest = _keys(q, k, self._own_keys), v, bucket_ids
            if self._waits:
                newest, self._newest = self._newest, newest
            self._append(*newest, next_v=v)
            ring = self._ring_of(bucket_ids if query_ids is None else query_ids)
            count = self._counts.view(-1)[ring]
            members = self._rings.view(-1, self._ring_size)[ring]
            is_member = torch.arange(self._ring_size, device=q.device) < count.unsqueeze(-1)
            return self._attend(q, v, members.flatten(2), is_member.flatten(2))

    def _append(self, k: Tensor, v: Tensor, bucket_ids: Tensor, *, next_v: Tensor) -> None:
        """Makes a token a key, now that the value [B, H, 1, D] of its successor is known, if it is needed."""
        n = self._next_value_heads
        self._pool.append(_entries(k, torch.cat([next_v[:, :n], v[:, n:]], dim=1)))
        entry = torch.arange(self._pool.size - k.shape[0], self._pool.size, device=k.device, dtype=torch.int32)
        ring = self._ring_of(bucket_ids)
        count = self._counts.view(-1)[ring]
        slots = ring * self._ring_size + count % self._ring_size
        self._rings.view(-1)[slots] = entry[:, None, None].expand_as(slots)
        self._counts.view(-1)[ring] = count + 1

    def _ring_of(self, bucket_ids: Tensor) -> Tensor:
        """Flat ring indices [B, H, R] of bucket ids [B, H, R, 1]."""
        n_buckets = self._counts.shape[3]
        first = torch.arange(0, self._counts.numel(), n_buckets, device=bucket_ids.device)
        return first.view(self._counts.shape[:3]) + bucket_ids[..., 0].long()

    def _attend(self, q: Tensor, v: Tensor, members: Tensor, is_member: Tensor) -> Tensor:
        """members [B, H, M]: pool slots of the keys; is_member [B, H, M]: False for unused ring slots."""
        n_heads, head_dim = q.shape[1], q.shape[3]
        rows = members.long() * n_heads + torch.arange(n_heads, device=q.device).unsqueeze(1)
        pool = self._pool.filled.view(-1, 2 * head_dim)
        entries = pool.index_select(0, rows.flatten()).view(*rows.shape, 2 * head_dim)
        k, values = entries.float().split(head_dim, dim=-1)
        scores = self._scale * (k @ q.float().transpose(-1, -2)).squeeze(-1)
        if self._counts_once:
            scores -= _multiplicity(members, is_member).log()
        has_no_key = ~is_member.any(dim=-1)
        scores.masked_fill_(~is_member, -torch.inf).masked_fill_(has_no_key.unsqueeze(-1), 0.0)
        out = scores.softmax(-1).unsqueeze(2) @ values
        alone = v.float() if self._attends_alone else 0.0
        return torch.where(has_no_key[..., None, None], alone, out).to(v.dtype)

    def select_rows(self, rows: Tensor) -> None:
        check_rows(rows, self._counts.shape[0])
        # the pool stays: rows that continue the same sequence share its entries
        self._counts, self._rings = self._counts[rows], self._rings[rows]
        k, v, bucket_ids = self._newest
        self._newest = k[rows], v[rows], bucket_ids[rows]

    def n_bytes(self) -> int:
        return self._pool.n_bytes() + sum(x.nbytes for x in (self._counts, self._rings, *self._newest))


def _keys(q: Tensor, k: Tensor | None, own_keys: bool) -> Tensor:
    """The keys [B, H, S, D]. Raises ValueError unless k is given if they are their own, and only then."""
    if (k is not None) != own_keys:
        raise ValueError(f"k={'None' if k is None else 'a tensor'}: must be given if own_keys=True, and only then")
    return shared_keys(q) if k is None else k


def _entries(k: Tensor, v: Tensor) -> Tensor:
    """Pool entries [B * S, H, 2 D] of tokens [B, H, S, D]."""
    return torch.cat([k, v], dim=-1).transpose(1, 2).flatten(0, 1)


def _fill_rings(buckets: Tensor, counts: Tensor, ring_size: int, n_heads: int) -> Tensor:
    """Rings int32 [B * H, R, K, ring_size] of a prompt's bucket ids [B * H, R, S], where K marks padding."""
    batch_heads, n_rounds, seq_len = buckets.shape
    n_buckets = counts.shape[2]
    rings = torch.zeros(batch_heads, n_rounds, n_buckets, ring_size, dtype=torch.int32, device=buckets.device)
    no_earlier = torch.zeros_like(counts[:, 0])
    for round_ in range(n_rounds if ring_size > 0 else 0):
        bucket = buckets[:, round_].long()
        rank = indices_in_bucket(bucket, no_earlier)
        total = torch.nn.functional.pad(counts[:, round_], (0, 1)).gather(1, bucket)  # 0 for padding
        is_last = (rank >= (total - ring_size).clamp_min(0)) & (rank < total)
        head_index, token = is_last.nonzero(as_tuple=True)
        slot = (head_index // n_heads) * seq_len + token
        at = head_index, token
        rings[head_index, round_, bucket[at], rank[at] % ring_size] = slot.to(torch.int32)
    return rings


def _multiplicity(members: Tensor, is_member: Tensor) -> Tensor:
    """Number of rounds in which each of members [B, H, M] occurs, at least 1."""
    is_same = members.unsqueeze(-1) == members.unsqueeze(-2)
    return (is_same & is_member.unsqueeze(-2)).sum(dim=-1).clamp_min(1)
