"""Invariants of layouts: one slot per token, order by (bucket, position), tiles within a bucket."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, cases, chunk_rules, window_rules
from torch import Tensor

from reformer_dist.ops.lsh import ChunkRule, WindowRule
from reformer_dist.ops.lsh.attention import Shard
from reformer_dist.ops.lsh.partition import choose_tiling
from reformer_dist.ops.lsh.sorting import mark_padding
from reformer_dist.ops.lsh.torch_tiles import tiles
from reformer_dist.ops.lsh.torch_tiles.attention import lay_out
from reformer_dist.ops.lsh.torch_tiles.layout import Layout


def build(case: Case) -> tuple[list[Layout], Tensor, Tensor]:
    """Layouts of all rounds, ids [BH, R, S] and whether each token of each head is real [BH, S]."""
    _, _, _, ids, mask = case.tensors()
    buckets = mark_padding(ids, case.options.n_buckets, mask)
    shard = Shard(buckets, case.options.n_buckets, torch.arange(len(buckets)), case.seq_len)
    return lay_out(shard, case.options), ids.flatten(0, 1), buckets[:, 0] < case.options.n_buckets


@settings(max_examples=100, deadline=None)
@given(cases(st.one_of(window_rules(), chunk_rules())))
def test_every_token_has_one_slot(case: Case) -> None:
    layouts, ids, real = build(case)
    assert len(layouts) == case.n_hashes
    token = torch.arange(ids.shape[0] * case.seq_len)
    for layout in layouts:
        slot = layout.slot_of_row[real.flatten()]
        assert slot.unique().numel() == slot.numel() == int((layout.query_slots >= 0).sum())
        assert torch.equal(layout.query_slots[slot], token[real.flatten()])
        # padding points to the last tile, which is empty
        last = layout.query_slots.numel() - 1
        assert (layout.slot_of_row[~real.flatten()] == last).all()
        assert (layout.query_slots.view(layout.n_tiles, -1)[-1] == -1).all()
        assert layout.key_slots.numel() == layout.query_slots.numel()
        if not (isinstance(case.options.rule, ChunkRule) and case.options.rule.wrap):
            # a token has the same slot as a query and as a key
            assert torch.equal(layout.key_slots, layout.query_slots)
            assert layout.key_slot_of_row is not None and torch.equal(layout.key_slot_of_row, layout.slot_of_row)


@settings(max_examples=100, deadline=None)
@given(cases(window_rules()))
def test_buckets_start_on_tile_borders(case: Case) -> None:
    layouts, ids, real = build(case)
    for round_, layout in enumerate(layouts):
        bucket = torch.where(real, ids[:, round_].long(), case.options.n_buckets)
        bucket = (bucket + torch.arange(ids.shape[0]).unsqueeze(1) * (case.options.n_buckets + 1)).flatten()
        assert layout.edges is not None
        edges, tile_len = layout.edges, layout.tiling.tile_len
        slots = layout.query_slots.view(layout.n_tiles, tile_len).tolist()
        members: dict[int, dict[int, list[int]]] = {}
        for tile, rank, count in zip(slots, edges.rank.tolist(), edges.count.tolist(), strict=True):
            taken = [t for t in tile if t >= 0]
            if not taken:
                assert count == 0
                continue
            (bucket_index,) = {int(bucket[t]) for t in taken}
            assert tile[: len(taken)] == taken and rank % tile_len == 0
            assert count == int((bucket == bucket_index).sum())
            assert bucket_index % (case.options.n_buckets + 1) < case.options.n_buckets
            members.setdefault(bucket_index, {})[rank] = taken
        for by_rank in members.values():
            tokens = [token for rank in sorted(by_rank) for token in by_rank[rank]]
            assert tokens == sorted(tokens)
            assert list(by_rank) == list(range(0, tile_len * len(by_rank), tile_len))


@settings(max_examples=100, deadline=None)
@given(cases(window_rules()), st.sampled_from([1, 40, 1000]))
def test_every_pair_within_reach_is_in_one_column(case: Case, span_slots: int) -> None:
    """For any order of the tiles, each query tile is paired with its neighbours, each in its column."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.SPAN_SLOTS, "cpu", span_slots)
        layouts, ids, _ = build(case)
    head_offset = torch.arange(ids.shape[0]).unsqueeze(1) * case.options.n_buckets
    for round_, layout in enumerate(layouts):
        assert layout.edges is not None
        tile_len = layout.tiling.tile_len
        bucket = (ids[:, round_].long() + head_offset).flatten().tolist()
        firsts = layout.query_slots.view(layout.n_tiles, tile_len)[:, 0].tolist()
        ranks = layout.edges.rank.tolist()
        tile_at = {(bucket[row], ranks[tile]): tile for tile, row in enumerate(firsts) if row >= 0}
        found = {}
        for span in layout.spans:
            assert span.columns[0].offset == 0
            for column in span.columns:
                for run in column.runs:
                    for i in range(run.n_tiles):
                        assert span.start <= run.keys + i < span.stop
                        found[run.queries + i, column.offset] = run.keys + i
        reach = range(-layout.tiling.n_after, layout.tiling.n_before + 1)
        for (bucket_index, rank), tile in tile_at.items():
            for offset in reach:
                neighbour = tile_at.get((bucket_index, rank - offset * tile_len))
                if neighbour is not None:
                    assert found[tile, offset] == neighbour


@settings(max_examples=50, deadline=None)
@given(cases(chunk_rules()))
def test_chunks_follow_the_order_by_bucket(case: Case) -> None:
    layouts, ids, real = build(case)
    for round_, layout in enumerate(layouts):
        for head in range(ids.shape[0]):
            slot = layout.slot_of_row.view(-1, case.seq_len)[head][real[head]]
            key = ids[head, round_][real[head]]
            assert torch.equal(slot.argsort(), key.argsort(stable=True))
            # the chunks of a head are contiguous
            if slot.numel():
                assert int(slot.max() - slot.min()) == slot.numel() - 1


@given(st.one_of(window_rules(), chunk_rules()), st.integers(1, 10**6), st.sampled_from([1, 2, 64, 4096]))
def test_tilings_are_sane(rule: object, seq_len: int, n_buckets: int) -> None:
    tiling = choose_tiling(rule, seq_len, n_buckets)  # type: ignore[arg-type]
    if isinstance(rule, WindowRule):
        assert tiling.tile_len in (16, 32, 64)
        assert tiling.n_before * tiling.tile_len >= rule.window - 1
