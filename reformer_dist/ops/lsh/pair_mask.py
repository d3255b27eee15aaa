"""Which pairs of a tile's queries and keys may meet, as what their scores start from: 0, -log N, or -inf."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.counter_dropout import keep_mask, token_keys
from reformer_dist.ops.lsh.layout import Layout
from reformer_dist.ops.lsh.order import are_near
from reformer_dist.ops.lsh.rules import AttentionOptions, WindowRule


@dataclass(frozen=True)
class Rows:
    """Who the rows of a group are: tokens of some units."""

    unit: Tensor
    """[n_rows] number of the (batch row, head) in its step: row * n_heads + head."""
    position: Tensor
    """[n_rows] in the whole sequence."""
    codes: Tensor | None = None
    """With count_pairs_once: [R, n_rows] codes of the rows' places in every round, see `order.place_codes`."""


class PairMask:
    """The mask of one round of a group of units, asked for block by block; nothing of it is kept."""

    def __init__(self, layout: Layout, round_: int, rows: Rows, options: AttentionOptions) -> None:
        self._layout, self._rows, self._options = layout, rows, options
        if isinstance(options.rule, WindowRule):
            self._band = _band(layout, options.rule)
            self._outside = _outside_bucket(layout)
        if options.dropout > 0:
            self._query_keys, self._key_keys = (
                token_keys(rows.unit, rows.position, round_, options.dropout_seed, is_query)
                for is_query in (True, False)
            )

    def scores(self, first_tile: int, n_tiles: int) -> Tensor:
        """float32 [tiles, tile_len, columns] to add scores to."""
        if isinstance(self._options.rule, WindowRule):
            start = self._band + self._outside[first_tile : first_tile + n_tiles]
        else:
            start = self._position_scores(self._options.rule.causal, first_tile, n_tiles)
        codes = self._rows.codes
        if codes is not None and codes.shape[0] > 1:
            start -= self._meetings(codes, first_tile, n_tiles).clamp_min_(1).log_()
        return start

    def dropout_factors(self, first_tile: int, n_tiles: int) -> Tensor:
        """0 or 1 / (1 - dropout), float32 [tiles, tile_len, columns]."""
        queries, keys = (rows.clamp_min(0) for rows in self._in_tiles(first_tile, n_tiles))
        dropout = self._options.dropout
        kept = keep_mask(self._query_keys[queries], self._key_keys[keys], dropout)
        return kept.float().mul_(1 / (1 - dropout))

    def _in_tiles(self, first_tile: int, n_tiles: int) -> tuple[Tensor, Tensor]:
        """Rows of the queries [tiles, tile_len] and keys [tiles, columns]; -1 where a slot is empty."""
        tiling = self._layout.tiling
        queries = self._layout.query_slots.view(-1, tiling.tile_len)[first_tile : first_tile + n_tiles]
        first_key = first_tile * tiling.tile_len
        keys = self._layout.key_slots[first_key:].unfold(0, tiling.columns, tiling.tile_len)[:n_tiles]
        return queries, keys

    def _position_scores(self, is_causal: bool, first_tile: int, n_tiles: int) -> Tensor:
        """Chunk rule: every key in sight but the query itself and, if causal, later ones."""
        queries, keys = self._in_tiles(first_tile, n_tiles)
        query, key = queries.unsqueeze(2), keys.unsqueeze(1)
        # rows of a unit are in order of position
        meets = (key < query) if is_causal else (key != query)
        meets = meets & (key >= 0) & (query >= 0)
        return torch.zeros(meets.shape, device=meets.device).masked_fill_(~meets, -torch.inf)

    def _meetings(self, codes: Tensor, first_tile: int, n_tiles: int) -> Tensor:
        """In how many rounds each pair meets: float32 [tiles, tile_len, columns]."""
        queries, keys = (rows.clamp_min(0) for rows in self._in_tiles(first_tile, n_tiles))
        meetings = torch.zeros(*queries.shape, keys.shape[1], device=queries.device)
        for round_codes in codes:
            meetings += are_near(
                round_codes[queries].unsqueeze(2), round_codes[keys].unsqueeze(1), self._options.rule
            )
        return meetings


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
