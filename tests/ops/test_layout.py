"""What every layout promises: a home for each token, order by (bucket, position), tiles that keep to a bucket."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, cases, chunk_rules, window_rules
from torch import Tensor

from reformer_dist.ops.lsh import ChunkRule
from reformer_dist.ops.lsh.layout import Layout, build_layouts, tiling_of


def build(case: Case) -> tuple[list[Layout], Tensor, Tensor]:
    """Layouts of all rounds, ids [heads, R, S] and whether each token of each head is real [heads, S]."""
    _, _, _, ids, mask = case.tensors()
    ids = ids.flatten(0, 1)
    real = torch.ones(ids.shape[0], case.seq_len, dtype=torch.bool)
    if mask is not None:
        real = mask.repeat_interleave(case.n_heads, dim=0)
    padding = ~real if mask is not None else None
    return build_layouts(ids, case.options.rule, case.options.n_buckets, padding), ids, real


@settings(max_examples=100, deadline=None)
@given(cases(st.one_of(window_rules(), chunk_rules())))
def test_every_token_has_one_home(case: Case) -> None:
    layouts, ids, real = build(case)
    assert len(layouts) == case.n_hashes
    token = torch.arange(ids.shape[0] * case.seq_len)
    for layout in layouts:
        assert layout.home.unique().numel() == token.numel()
        found = layout.query_slots[layout.home]
        assert torch.equal(found[real.flatten()], token[real.flatten()])
        others = layout.query_slots[layout.query_slots >= 0]
        assert others.unique().numel() == others.numel() >= int(real.sum())
        tiling = layout.tiling
        assert layout.key_slots.numel() == tiling.back + layout.query_slots.numel() + tiling.front
        if not (isinstance(case.options.rule, ChunkRule) and case.options.rule.wrap):
            # a token stands at the same place as a query and as a key
            as_keys = layout.key_slots[tiling.back :][: layout.query_slots.numel()]
            assert torch.equal(as_keys, layout.query_slots)


@settings(max_examples=100, deadline=None)
@given(cases(window_rules()))
def test_buckets_start_on_tile_borders(case: Case) -> None:
    layouts, ids, real = build(case)
    for round_, layout in enumerate(layouts):
        bucket = torch.where(real, ids[:, round_].long(), case.options.n_buckets)
        bucket = (bucket + torch.arange(ids.shape[0]).unsqueeze(1) * (case.options.n_buckets + 1)).flatten()
        assert layout.rank is not None and layout.count is not None
        tiles = layout.query_slots.view(layout.n_tiles, layout.tiling.tile_len).tolist()
        members: dict[int, list[int]] = {}
        for tile, rank, count in zip(tiles, layout.rank.tolist(), layout.count.tolist(), strict=True):
            taken = [t for t in tile if t >= 0]
            (number,) = {int(bucket[t]) for t in taken}
            assert tile[: len(taken)] == taken and rank == len(members.get(number, []))
            members.setdefault(number, []).extend(taken)
            size = int((bucket == number).sum())
            assert count == (0 if number % (case.options.n_buckets + 1) == case.options.n_buckets else size)
        assert list(members) == sorted(members)
        assert all(tokens == sorted(tokens) for tokens in members.values())


@settings(max_examples=50, deadline=None)
@given(cases(chunk_rules()))
def test_chunks_follow_the_order_by_bucket(case: Case) -> None:
    layouts, ids, real = build(case)
    for round_, layout in enumerate(layouts):
        for head in range(ids.shape[0]):
            home = layout.home.view(-1, case.seq_len)[head]
            key = torch.where(real[head], ids[head, round_].long(), case.options.n_buckets)
            assert torch.equal(home.argsort(), key.argsort(stable=True))
            # heads keep apart, and a head's chunks follow one another without a gap
            assert int(home.max() - home.min()) == case.seq_len - 1


@given(st.one_of(window_rules(), chunk_rules()), st.integers(1, 10**6), st.sampled_from([1, 2, 64, 4096]))
def test_tilings_are_sane(rule: object, seq_len: int, n_buckets: int) -> None:
    tiling = tiling_of(rule, seq_len, n_buckets)  # type: ignore[arg-type]
    assert tiling.tile_len >= 1 and tiling.columns == tiling.back + tiling.tile_len + tiling.front
    if not isinstance(rule, ChunkRule):
        assert tiling.tile_len in (16, 32, 64)
