"""Which pairs of a tile's queries and keys may meet, as what their scores start from: 0, -log N, or -inf."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reformer_dist.ops.counter_dropout import keep_mask, token_keys
from reformer_dist.ops.lsh.layout import Layout
from reformer_dist.ops.lsh.rules import WindowRule

if TYPE_CHECKING:
    from reformer_dist.ops.lsh.attention import AttentionOptions


class PairMask:
    """The mask of one round of a group of heads, asked for block by block; nothing of it is kept."""

    def __init__(
        self,
        layouts: list[Layout],
        round_: int,
        options: AttentionOptions,
        *,
        first_head: int,
        seq_len: int,
    ) -> None:
        self._layouts = layouts
        self._layout = layouts[round_]
        self._round = round_
        self._options = options
        self._first_head = first_head
        self._seq_len = seq_len
        if isinstance(options.rule, WindowRule):
            self._band = _band(self._layout, options.rule)
            self._outside = _outside_bucket(self._layout)

    def scores(self, first_tile: int, n_tiles: int) -> Tensor:
        """float32 [tiles, tile_len, columns] to add scores to."""
        if isinstance(self._options.rule, WindowRule):
            start = self._band + self._outside[first_tile : first_tile + n_tiles]
        else:
            start = self._position_scores(self._options.rule.causal, first_tile, n_tiles)
        if self._options.count_pairs_once and len(self._layouts) > 1:
            start -= self._meetings(first_tile, n_tiles).clamp_min_(1).log_()
        return start

    def dropout_factors(self, first_tile: int, n_tiles: int) -> Tensor:
        """0 or 1 / (1 - dropout), float32 [tiles, tile_len, columns]."""
        queries, keys = self._tokens(first_tile, n_tiles)
        dropout, seed = self._options.dropout, self._options.dropout_seed
        query_keys, key_keys = (
            token_keys(t // self._seq_len + self._first_head, t % self._seq_len, self._round, seed, is_query)
            for t, is_query in ((queries, True), (keys, False))
        )
        return keep_mask(query_keys, key_keys, dropout).float().mul_(1 / (1 - dropout))

    def _tokens(self, first_tile: int, n_tiles: int) -> tuple[Tensor, Tensor]:
        """Tokens of the queries [tiles, tile_len] and keys [tiles, columns]; -1 where a slot is empty."""
        tiling = self._layout.tiling
        queries = self._layout.query_slots.view(-1, tiling.tile_len)[first_tile : first_tile + n_tiles]
        first_key = first_tile * tiling.tile_len
        keys = self._layout.key_slots[first_key:].unfold(0, tiling.columns, tiling.tile_len)[:n_tiles]
        return queries, keys

    def _position_scores(self, is_causal: bool, first_tile: int, n_tiles: int) -> Tensor:
        """Chunk rule: every key in sight but the query itself and, if causal, later ones."""
        queries, keys = self._tokens(first_tile, n_tiles)
        query, key = queries.unsqueeze(2), keys.unsqueeze(1)
        meets = (key < query) if is_causal else (key != query)
        meets = meets & (key >= 0) & (query >= 0)
        return torch.zeros(meets.shape, device=meets.device).masked_fill_(~meets, -torch.inf)

    def _meetings(self, first_tile: int, n_tiles: int) -> Tensor:
        """In how many rounds each pair meets: float32 [tiles, tile_len, columns]."""
        queries, keys = (t.clamp_min(0) for t in self._tokens(first_tile, n_tiles))
        meetings = torch.zeros(*queries.shape, keys.shape[1], device=queries.device)
        for layout in self._layouts:
            meetings += self._meet_in(layout, queries, keys)
        return meetings

    def _meet_in(self, layout: Layout, queries: Tensor, keys: Tensor) -> Tensor:
        rule, tile_len = self._options.rule, layout.tiling.tile_len
        query_slot, key_slot = layout.home[queries].unsqueeze(2), layout.home[keys].unsqueeze(1)
        if isinstance(rule, WindowRule):
            # slots of one bucket are consecutive; the window may reach into another bucket's
            distance = query_slot - key_slot
            near = (distance >= 0) & (distance < rule.window) if rule.causal else distance.abs() < rule.window
            assert layout.rank is not None
            bucket_start = torch.arange(layout.n_tiles, device=queries.device) * tile_len - layout.rank
            same_bucket = bucket_start[query_slot // tile_len] == bucket_start[key_slot // tile_len]
            return near & same_bucket
        chunk_distance = query_slot // tile_len - key_slot // tile_len
        return (chunk_distance <= rule.n_before) & (chunk_distance >= -rule.n_after)


def _band(layout: Layout, rule: WindowRule) -> Tensor:
    """Window rule: 0 within the window around the diagonal, else -inf; [tile_len, columns]."""
    tiling, device = layout.tiling, layout.home.device
    row = torch.arange(tiling.tile_len, device=device).unsqueeze(1)
    distance = row + tiling.back - torch.arange(tiling.columns, device=device)
    near = (distance >= 0) & (distance < rule.window) if rule.causal else distance.abs() < rule.window
    if not rule.sees_self:
        near &= distance != 0
    return torch.zeros(near.shape, device=device).masked_fill_(~near, -torch.inf)


def _outside_bucket(layout: Layout) -> Tensor:
    """Window rule: 0 in columns that hold members of the tile's bucket, else -inf; [tiles, 1, columns]."""
    assert layout.rank is not None and layout.count is not None
    column = torch.arange(layout.tiling.columns, device=layout.home.device)
    rank = layout.rank.unsqueeze(1) + (column - layout.tiling.back)
    is_member = (rank >= 0) & (rank < layout.count.unsqueeze(1))
    outside = torch.zeros(rank.shape, device=rank.device).masked_fill_(~is_member, -torch.inf)
    return outside.unsqueeze(1)
