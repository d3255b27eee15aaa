"""Reference implementation: the definition of LSH attention, in dense matrices.

All backends are tested against its outputs and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_dist.ops.dropout import keep_mask, token_keys
from reformer_dist.ops.lsh.neighbour_rules import ChunkRule, Rule, WindowRule


def visible_pairs(
    bucket_ids: Tensor,
    rule: Rule,
    key_padding_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Number of times query i attends to key j in each round: int64 [B, H, R, S, S].

    bucket_ids [B, H, R, S]; key_padding_mask [B, S], True for real tokens. Padding is in no bucket, neither as a
    query nor as a key. A token does not attend to itself unless rule.sees_self. query_ids [B, H, R, S]: buckets of
    the queries, under the window rule, if those of the keys are their own. document_ids [B, S], with a WindowRule:
    each document has buckets of its own.
    """
    if document_ids is not None:
        n_buckets = max(int(ids.max()) for ids in (bucket_ids, query_ids) if ids is not None) + 1
        first_bucket = document_ids[:, None, None, :].long() * n_buckets
        bucket_ids = bucket_ids.long() + first_bucket
        query_ids = None if query_ids is None else query_ids.long() + first_bucket
    batch, n_heads, n_hashes, seq_len = bucket_ids.shape
    visible = torch.zeros(batch, n_heads, n_hashes, seq_len, seq_len, dtype=torch.int64, device="cpu")
    for b in range(batch):
        real = torch.ones(seq_len, dtype=torch.bool, device="cpu")
        if key_padding_mask is not None:
            real = key_padding_mask[b].cpu()
        for h in range(n_heads):
            buckets = bucket_ids[b, h].cpu().long()
            if isinstance(rule, WindowRule):
                for r in range(n_hashes):
                    if query_ids is None:
                        visible[b, h, r] = _window_round(buckets[r], rule, real)
                    else:
                        query_bucket = query_ids[b, h, r].cpu().long()
                        visible[b, h, r] = _own_keys_round(query_bucket, buckets[r], rule, real)
            else:
                visible[b, h] = _chunk_rounds(buckets, rule, real)
    return visible.to(bucket_ids.device)


def _window_round(bucket: Tensor, rule: WindowRule, real: Tensor) -> Tensor:
    same_bucket = (bucket[:, None] == bucket[None, :]) & real[:, None] & real[None, :]
    # rank of a token: number of members of its bucket before it
    rank = torch.tril(same_bucket, diagonal=-1).sum(dim=1)
    distance = rank[:, None] - rank[None, :]
    near = (distance >= 0) & (distance < rule.window) if rule.causal else distance.abs() < rule.window
    visible = same_bucket & near
    if not rule.sees_self:
        visible.fill_diagonal_(False)
    return visible.long()


def _own_keys_round(query_bucket: Tensor, key_bucket: Tensor, rule: WindowRule, real: Tensor) -> Tensor:
    in_bucket = (query_bucket[:, None] == key_bucket[None, :]) & real[:, None] & real[None, :]
    # keys of the query's bucket up to its position, its own included unless not rule.sees_self
    n_up_to = torch.tril(in_bucket, diagonal=0 if rule.sees_self else -1).sum(dim=1)
    rank = torch.tril((key_bucket[:, None] == key_bucket[None, :]) & real[None, :], diagonal=-1).sum(dim=1)
    distance = n_up_to[:, None] - 1 - rank[None, :]
    near = (distance >= 0) & (distance < rule.window) if rule.causal else distance.abs() < rule.window
    return (in_bucket & near).long()


def _chunk_rounds(buckets: Tensor, rule: ChunkRule, real: Tensor) -> Tensor:
    n_hashes, seq_len = buckets.shape
    n_chunks = rule.n_chunks(seq_len)
    visible = torch.zeros(n_hashes, seq_len, seq_len, dtype=torch.int64, device="cpu")
    # padding sorts after every bucket
    padded = torch.where(real, buckets, buckets.max() + 1)
    orders = [torch.argsort(padded[r], stable=True) for r in range(n_hashes)]
    chunks = [[order[c * rule.chunk_len : (c + 1) * rule.chunk_len] for c in range(n_chunks)] for order in orders]
    for r in range(n_hashes):
        for c, queries in enumerate(chunks[r]):
            for offset in range(-rule.n_before, rule.n_after + 1):
                index = r * n_chunks + c + offset
                if not rule.wrap and not 0 <= c + offset < n_chunks:
                    continue
                other_round, other_chunk = divmod(index % (n_hashes * n_chunks), n_chunks)
                query, key = queries[:, None], chunks[other_round][other_chunk][None, :]
                allowed = key <= query if rule.causal else key == key
                if not rule.sees_self:
                    allowed = allowed & (key != query)
                visible[r, query, key] += (allowed & real[key] & real[query]).long()
    return visible


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bucket_ids: Tensor,
    rule: Rule,
    *,
    scale: float,
    key_padding_mask: Tensor | None = None,
    count_pairs_once: bool = False,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    head_indices: Tensor | None = None,
    query_ids: Tensor | None = None,
    attends_alone: bool = True,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Softmax over the union of all (round, key) pairs; q, k, v and the result are [B, H, S, D].

    A pair that is visible in several rounds counts once per round, or once with count_pairs_once (the paper's
    N(i, j)). A token without keys attends to itself if attends_alone, else to nothing. head_indices [B * H]: see
    `DropoutOptions.head_indices`, 0, 1, ... if None. query_ids, document_ids: see `visible_pairs`. Differentiable;
    computes in float32 or wider.
    """
    visible = visible_pairs(bucket_ids, rule, key_padding_mask, query_ids, document_ids)
    out, met_no_key = _union_softmax(
        q, k, v, visible, scale, count_pairs_once, _dropout_factors(visible, dropout, dropout_seed, head_indices)
    )
    own = v if attends_alone else torch.zeros_like(v)
    return torch.where(met_no_key[..., None], own.to(out.dtype), out).to(v.dtype)


def reference_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ids: Tensor,
    key_ids: Tensor,
    *,
    scale: float,
    key_padding_mask: Tensor | None = None,
    count_pairs_once: bool = False,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    head_indices: Tensor | None = None,
) -> Tensor:
    """A query attends to every key of another sequence in its bucket in some round: the paper's P_i (eq. 4).

    q [B, H, S, D] with query_ids [B, H, R, S]; k, v [B, H, T, D] with key_ids [B, H, R, T]; key_padding_mask
    [B, T], True for real keys. The result is [B, H, S, D], 0 for a query without keys. The other arguments
    are those of `reference_attention`.
    """
    visible = query_ids.unsqueeze(-1) == key_ids.unsqueeze(-2)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, None, :]
    factors = _dropout_factors(visible, dropout, dropout_seed, head_indices)
    out, met_no_key = _union_softmax(q, k, v, visible.long(), scale, count_pairs_once, factors)
    return out.masked_fill(met_no_key[..., None], 0.0).to(v.dtype)


def _union_softmax(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, count_pairs_once: bool, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, D] in float32 or wider, and which queries met no key, [B, H, S]: their output is undefined.

    visible [B, H, R, S, T]: times query i attends to key j in each round; factors [B, H, S, R, T]: of dropout.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    visible = visible.to(wide)
    if count_pairs_once:
        visible = visible / visible.sum(dim=2, keepdim=True).clamp_min(1)
    met_no_key = visible.sum(dim=(2, 4)) == 0
    scores = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    scores = scores.unsqueeze(2) + visible.log()
    scores = scores.transpose(2, 3)  # [B, H, S, R, T]: one softmax over rounds and keys
    scores = scores.masked_fill(met_no_key[..., None, None], 0.0)
    weights = scores.flatten(-2).softmax(-1).view_as(scores)
    if factors is not None:
        weights = weights * factors
    return torch.einsum("bhirj,bhjd->bhid", weights, v.to(wide)), met_no_key


def _dropout_factors(visible: Tensor, dropout: float, seed: int, head_indices: Tensor | None) -> Tensor | None:
    """0 or 1 / (1 - dropout) for each pair of `visible` [B, H, R, S, T]: [B, H, S, R, T]; None without dropout."""
    if dropout == 0.0:
        return None
    batch, n_heads, n_hashes, n_queries, n_keys = visible.shape
    device = visible.device
    head = torch.arange(batch * n_heads, device=device) if head_indices is None else head_indices
    head = head.view(-1, 1)
    rounds = []
    for r in range(n_hashes):
        query_keys, key_keys = (
            token_keys(head, torch.arange(length, device=device).view(1, -1), r, seed, is_query)
            for length, is_query in ((n_queries, True), (n_keys, False))
        )
        rounds.append(keep_mask(query_keys, key_keys, dropout))
    keep = torch.stack(rounds, dim=2).view(batch, n_heads, n_queries, n_hashes, n_keys)
    return keep.float() / (1 - dropout)
