"""Score bias of the pairs in a column: 0, -log N (N shared rounds), or -inf where a query must not attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.dropout import keep_mask, token_keys
from reformer_dist.ops.lsh.neighbour_rules import ChunkRule, WindowRule, within_reach
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.torch_tiles.layout import Edges, Layout
from reformer_dist.ops.lsh.torch_tiles.tiles import Column
from reformer_dist.ops.tensor_cache import cache_tensors


@dataclass(frozen=True)
class Rows:
    """The tokens of a group of heads, one per row."""

    head_index: Tensor | None
    """[n_rows] batch row * n_heads + head in the step; only with dropout."""
    positions: Tensor
    """[n_rows] positions in the whole sequence."""
    codes: Tensor | None = None
    """[R, n_rows] with count_pairs_once: `sorting.position_codes` of every round."""
    query_codes: Tensor | None = None
    """[R, n_rows] likewise, as queries, if keys have buckets of their own."""
    document_ids: Tensor | None = None
    """[n_rows]"""


class PairMask:
    """The mask of one round of a group of heads, computed column by column: [n_tiles, queries, keys] each."""

    def __init__(self, layout: Layout, round_: int, rows: Rows, options: AttentionOptions) -> None:
        self._layout, self._rows, self._options = layout, rows, options
        if options.dropout > 0:
            assert rows.head_index is not None
            self._query_keys, self._key_keys = (
                token_keys(rows.head_index, rows.positions, round_, options.dropout_seed, is_query)
                for is_query in (True, False)
            )

    def bias(self, column: Column) -> Tensor:
        """Bias of the scores, over log 2: float32 [n_tiles or 1, tile_len, tile_len]. Cached: do not modify."""
        rule = self._options.rule
        bias = self._window_bias(column, rule) if isinstance(rule, WindowRule) else self._chunk_bias(column, rule)
        if self._rows.document_ids is not None:
            bias = bias.masked_fill(self._crosses_documents(self._rows.document_ids, column), -torch.inf)
        codes = self._rows.codes
        if codes is not None and codes.shape[0] > 1:
            bias = bias - self._count_shared_rounds(codes, column).clamp_min_(1).log2_()
        return bias

    def dropout_factors(self, column: Column) -> Tensor:
        """0 or 1 / (1 - dropout), float32 [n_tiles, tile_len, tile_len]."""
        queries, keys = (rows.clamp_min(0) for rows in self._rows_of(column))
        dropout = self._options.dropout
        keep = keep_mask(self._query_keys[queries], self._key_keys[keys], dropout)
        return keep.float().mul_(1 / (1 - dropout))

    def _rows_of(self, column: Column) -> tuple[Tensor, Tensor]:
        """Rows of the queries and of the keys, [n_tiles, tile_len] each; -1 if empty."""
        queries, keys = (
            slots.view(-1, self._layout.tiling.tile_len)
            for slots in (self._layout.query_slots, self._layout.key_slots)
        )
        tiles = (keys[run.keys :: run.key_step][: run.n_tiles] for run in column.runs)
        return queries[column.queries], torch.cat(list(tiles))

    def _window_bias(self, column: Column, rule: WindowRule) -> Tensor:
        edges, tiles = self._layout.edges, column.queries
        assert edges is not None
        if self._layout.query_ranks is not None:
            return self._own_keys_bias(column, rule, edges, self._layout.query_ranks)
        band = _band(rule, self._layout.tiling.tile_len, column.offset, edges.rank.device)
        if not edges.is_edge[tiles].any():
            return band
        lag = _lag(self._layout.tiling.tile_len, column.offset, edges.rank.device)
        rank = edges.rank[tiles].unsqueeze(1) - lag
        is_member = (rank >= 0) & (rank < edges.count[tiles].unsqueeze(1))
        outside = torch.zeros(rank.shape, dtype=torch.float32, device=rank.device)
        return band + outside.masked_fill_(~is_member, -torch.inf).unsqueeze(1)

    def _own_keys_bias(self, column: Column, rule: WindowRule, edges: Edges, query_ranks: Tensor) -> Tensor:
        tile_len = self._layout.tiling.tile_len
        first = edges.rank[column.queries].unsqueeze(1)
        rank = first - _lag(tile_len, column.offset, first.device)
        is_member = (rank >= 0) & (rank < edges.count[column.queries].unsqueeze(1))
        query_rank = query_ranks.view(-1, tile_len)[column.queries]
        visible = within_reach(query_rank.unsqueeze(2), rank.unsqueeze(1), rule) & is_member.unsqueeze(1)
        bias = torch.zeros(visible.shape, dtype=torch.float32, device=visible.device)
        return bias.masked_fill_(~visible, -torch.inf)

    def _chunk_bias(self, column: Column, rule: ChunkRule) -> Tensor:
        """Chunk rule: all keys of the tile except later ones (causal) and the query itself (unless sees_self)."""
        queries, keys = self._rows_of(column)
        query, key = queries.unsqueeze(2), keys.unsqueeze(1)
        # rows of a head are sorted by position
        visible = (key >= 0) & (query >= 0)
        if rule.causal:
            visible &= key <= query
        if not rule.sees_self:
            visible &= key != query
        bias = torch.zeros(visible.shape, dtype=torch.float32, device=visible.device)
        return bias.masked_fill_(~visible, -torch.inf)

    def _crosses_documents(self, document_ids: Tensor, column: Column) -> Tensor:
        """Whether a pair's tokens are of different documents, [n_tiles, tile_len, tile_len]."""
        queries, keys = (document_ids[rows.clamp_min(0)] for rows in self._rows_of(column))
        return queries.unsqueeze(2) != keys.unsqueeze(1)

    def _count_shared_rounds(self, codes: Tensor, column: Column) -> Tensor:
        """Number of rounds in which each pair is visible, float32 [n_tiles, tile_len, tile_len]."""
        queries, keys = (rows.clamp_min(0) for rows in self._rows_of(column))
        n_shared = torch.zeros(*queries.shape, keys.shape[1], dtype=torch.float32, device=queries.device)
        query_codes = codes if self._rows.query_codes is None else self._rows.query_codes
        for of_queries, of_keys in zip(query_codes, codes, strict=True):
            n_shared += within_reach(
                of_queries[queries].unsqueeze(2), of_keys[keys].unsqueeze(1), self._options.rule
            )
        return n_shared


def _lag(tile_len: int, offset: int, device: torch.device) -> Tensor:
    """Distance of each key of a tile before the first slot of its tile of queries, [tile_len]."""
    return offset * tile_len - torch.arange(tile_len, device=device)


@cache_tensors(maxsize=256)
def _band(rule: WindowRule, tile_len: int, offset: int, device: torch.device) -> Tensor:
    """0 within the window of each query, else -inf: [1, tile_len, tile_len]."""
    distance = torch.arange(tile_len, device=device).unsqueeze(1) + _lag(tile_len, offset, device)
    near = (distance >= 0) & (distance < rule.window) if rule.causal else distance.abs() < rule.window
    if not rule.sees_self:
        near &= distance != 0
    return torch.zeros(1, *near.shape, dtype=torch.float32, device=device).masked_fill_(~near, -torch.inf)
