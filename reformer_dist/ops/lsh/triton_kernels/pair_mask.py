"""Masks of query-key pairs: attended or not, in how many rounds, kept by dropout or not; shapes broadcast.

C is the `tiles.KernelConstants` of a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Indices(NamedTuple):
    """Slots (see `load`; FAR for masked ones) and rows of some queries or keys of a head."""

    slot: Any
    row: Any


class Dropout(NamedTuple):
    """A pair is kept if its 31-bit hash with the seed reaches the threshold, and is multiplied by the factor."""

    seed: Any
    threshold: Any
    factor: Any


class PairContext(NamedTuple):
    """Parameters shared by all pairs of a program."""

    begin: Any
    """First slot of the bucket."""
    query_codes_ptr: Any
    """Position codes of the head's rows as queries, int32 [R, S], see `tiles.Tiles.codes`."""
    codes_ptr: Any
    """Likewise, as keys."""
    token_ids: Any
    """See `load_token_ids`."""
    documents_ptr: Any
    """Documents of the head's rows, int32 [S], see `tiles.Tiles.document_ids`."""
    seq_len: Any
    scale: Any
    dropout: Any


@triton.jit
def pair_context(
    bounds, query_codes_ptr, codes_ptr, token_ids_ptr, documents_ptr, seq_len, scale, dropout, C: tl.constexpr,
):  # fmt: skip
    """PairContext of this program; codes [BH, R, S], documents [BH, S]."""
    head = tl.program_id(2)
    codes_at = head.to(tl.int64) * C.n_rounds * seq_len
    query_codes_ptr += codes_at
    codes_ptr += codes_at
    token_ids = load_token_ids(token_ids_ptr, head, C)
    documents_ptr += head.to(tl.int64) * seq_len
    return PairContext(bounds.begin, query_codes_ptr, codes_ptr, token_ids, documents_ptr, seq_len, scale, dropout)


@triton.jit
def as_column(x):
    """Indices [n, 1]."""
    return Indices(x.slot[:, None], x.row[:, None])


@triton.jit
def as_line(x):
    """Indices [1, n]."""
    return Indices(x.slot[None, :], x.row[None, :])


@triton.jit
def near(distance, C: tl.constexpr):
    """Whether the rule allows this distance of two slots, or of two chunks: query minus key."""
    if C.chunked:
        is_near = (distance <= C.before) & (distance >= -C.after)
    elif C.causal:
        is_near = (distance >= 0) & (distance < C.span)
    else:
        is_near = (distance > -C.span) & (distance < C.span)
    return is_near


@triton.jit
def attends(query, key, pairs, INSIDE: tl.constexpr, C: tl.constexpr):
    """Whether each query attends to each key: both Indices, and INSIDE if both are the rows of the tile.

    With C.by_rank, slots beyond the bucket are no exception: keys there are after every query of the bucket, and
    queries there are neither stored nor, by lse = inf, part of a gradient. Keys outside the tile of a query are
    before it, and blocks of them begin in the bucket, since tiles of a bucket are whole blocks apart.
    """
    if C.by_rank:
        if not INSIDE:
            is_near = query.slot - key.slot < C.span
        else:
            if C.sees_self:
                is_near = query.slot >= key.slot
            else:
                is_near = query.slot > key.slot
            if C.span < C.block:
                is_near = is_near & (query.slot - key.slot < C.span)
    elif C.chunked:
        is_near = near((query.slot - pairs.begin) // C.span - (key.slot - pairs.begin) // C.span, C)
        # a head's rows are ordered by position
        if C.causal:
            is_near = is_near & (key.row <= query.row)
        if not C.sees_self:
            is_near = is_near & (key.row != query.row)
    else:
        is_near = near(query.slot - key.slot, C)
        if not C.sees_self:
            is_near = is_near & (query.slot != key.slot)
    if C.documents:
        is_near = is_near & (tl.load(pairs.documents_ptr + query.row) == tl.load(pairs.documents_ptr + key.row))
    return is_near


@triton.jit
def count_rounds(query, key, pairs, C: tl.constexpr):
    """Number of rounds in which each query attends to each key, at least 1, float32: both Indices."""
    number = (query.row - key.row).to(tl.float32) * 0.0
    for r in range(C.n_rounds):
        query_code = tl.load(pairs.query_codes_ptr + r * pairs.seq_len + query.row)
        key_code = tl.load(pairs.codes_ptr + r * pairs.seq_len + key.row)
        number += near(query_code - key_code, C).to(tl.float32)
    return tl.maximum(number, 1.0)


@triton.jit
def mix(x):
    """The bijection of 32-bit integers of `ops.dropout`."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def token_keys(row, round_, pairs, IS_QUERY: tl.constexpr, C: tl.constexpr):
    """`ops.dropout.token_keys` of rows: uint32."""
    position, head = row, pairs.token_ids
    if C.sharded:
        position, head = tl.load(pairs.token_ids + row), tl.load(pairs.token_ids + pairs.seq_len + row)
    salt = (round_.to(tl.uint32) * 0x9E3779B9) ^ pairs.dropout.seed
    if IS_QUERY:
        salt ^= 0x5BD1E995
    key = mix(position.to(tl.uint32) + salt)
    return mix(key ^ (head.to(tl.uint32) * 0x85EBCA6B))


@triton.jit
def dropout_factors(query, key, round_, pairs, C: tl.constexpr):
    """1 / (1 - dropout) where `ops.dropout` keeps a pair, else 0. round_: of the query."""
    query_keys = token_keys(query.row, round_, pairs, True, C)
    key_keys = token_keys(key.row, round_, pairs, False, C)
    is_kept = (mix(query_keys ^ key_keys) & 0x7FFFFFFF) >= pairs.dropout.threshold
    return tl.where(is_kept, pairs.dropout.factor, 0.0)


@triton.jit
def load_token_ids(token_ids_ptr, head, C: tl.constexpr):
    """The head's index in its step, or the pointer to the ids of a shard's rows: see `tiles.Tiles.token_ids`."""
    token_ids = token_ids_ptr
    if C.drops and not C.sharded:
        token_ids = tl.load(token_ids_ptr + head)
    return token_ids
