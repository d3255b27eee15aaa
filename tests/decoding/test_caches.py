"""KV caches, one token at a time, match reference attention over the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decoding_helpers import left_padding
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reformer_dist.ops.exact_attention import exact_attention
from reformer_dist.ops.kv_cache import BucketCache, ExactCache, WindowCache
from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention
from reformer_dist.ops.lsh.reference import reference_attention
from reformer_dist.ops.lsh.shared_keys import shared_keys


@dataclass(frozen=True)
class Text:
    """Sizes of random rows whose first n_prompt tokens are the prompt."""

    batch: int
    n_heads: int
    n_rounds: int
    n_buckets: int
    window: int
    n_prompt: int
    n_more: int
    head_dim: int
    is_padded: bool
    seed: int

    @property
    def seq_len(self) -> int:
        return self.n_prompt + self.n_more

    def draw(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v [B, H, S, D], bucket ids [B, H, R, S], mask [B, S] or None."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.n_heads, self.seq_len, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        ids_shape = (self.batch, self.n_heads, self.n_rounds, self.seq_len)
        ids = torch.randint(0, self.n_buckets, ids_shape, generator=generator, dtype=torch.uint8)
        if not self.is_padded:
            return q, k, v, ids, None
        padding = torch.randint(0, self.n_prompt, (self.batch,), generator=generator)
        return q, k, v, ids, left_padding((self.seq_len - padding).tolist(), self.seq_len)


TEXTS = st.builds(
    Text,
    batch=st.integers(1, 3),
    n_heads=st.integers(1, 2),
    n_rounds=st.integers(1, 4),
    n_buckets=st.sampled_from([1, 2, 6, 16]),
    window=st.sampled_from([1, 2, 3, 8, 50]),
    n_prompt=st.integers(1, 30),
    n_more=st.integers(1, 25),
    head_dim=st.sampled_from([1, 8]),
    is_padded=st.booleans(),
    seed=st.integers(0, 2**31),
)


def step_by_step(attend: Any, text: Text, *tensors: Tensor) -> Tensor:
    """Outputs of the tokens after the prompt, [B, H, n_more, D]."""
    places = range(text.n_prompt, text.seq_len)
    return torch.cat([attend(*(x[..., p : p + 1, :] for x in tensors)) for p in places], dim=2)


def through_buckets(text: Text, options: AttentionOptions, q: Tensor, v: Tensor, ids: Tensor, mask: Any) -> Tensor:
    n = text.n_prompt
    cache = BucketCache(q[:, :, :n], v[:, :, :n], ids[..., :n], options, None if mask is None else mask[:, :n])

    def attend(q: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return cache.attend(q, v, ids.transpose(2, 3))

    return step_by_step(attend, text, q, v, ids.transpose(2, 3))


@given(
    text=TEXTS,
    counts_once=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    next_value_heads=st.sampled_from([0, 1]),
)
def test_buckets(text: Text, counts_once: bool, scale: float, next_value_heads: int) -> None:
    q, _, v, ids, mask = text.draw()
    rule = WindowRule(text.window, causal=True)
    options = AttentionOptions(rule, text.n_buckets, scale, counts_once, next_value_heads, backend="reference")
    if mask is not None:
        v = v * mask[:, None, :, None]
    found = through_buckets(text, options, q, v, ids, mask)
    expected = bucket_attention(q, None, v, ids, options, mask)
    torch.testing.assert_close(found, expected[:, :, text.n_prompt :], atol=2e-6, rtol=1e-5)


@given(
    text=TEXTS,
    counts_once=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    next_value_heads=st.sampled_from([0, 1]),
)
def test_buckets_of_own_keys(text: Text, counts_once: bool, scale: float, next_value_heads: int) -> None:
    q, k, v, ids, mask = text.draw()
    query_ids, n = ids.flip(-1), text.n_prompt
    rule = WindowRule(text.window, causal=True, sees_self=next_value_heads == 0)
    options = AttentionOptions(
        rule, text.n_buckets, scale, counts_once, next_value_heads, backend="reference", own_keys=True
    )
    if mask is not None:
        v = v * mask[:, None, :, None]
    prompt = None if mask is None else mask[:, :n]
    cache = BucketCache(q[:, :, :n], v[:, :, :n], ids[..., :n], options, prompt, k=k[:, :, :n])

    def attend(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, query_ids: Tensor) -> Tensor:
        return cache.attend(q, v, ids.transpose(2, 3), k=k, query_ids=query_ids.transpose(2, 3))

    found = step_by_step(attend, text, q, k, v, ids.transpose(2, 3), query_ids.transpose(2, 3))
    expected = bucket_attention(q, k, v, ids, options, mask, query_ids)
    torch.testing.assert_close(found, expected[:, :, n:], atol=2e-6, rtol=1e-5)


def test_unused_ring_slots_do_not_count_as_keys() -> None:
    """They contain pool slot 0, whose token is in other rings."""
    text = Text(2, 1, 2, 2, window=50, n_prompt=10, n_more=5, head_dim=4, is_padded=False, seed=0)
    q, _, v, ids, _ = text.draw()
    options = AttentionOptions(WindowRule(text.window, causal=True), 2, 1.0, count_pairs_once=True)
    found = through_buckets(text, options, q, v, ids, None)
    expected = reference_attention(q, shared_keys(q), v, ids, options.rule, scale=1.0, count_pairs_once=True)
    torch.testing.assert_close(found, expected[:, :, text.n_prompt :], atol=2e-6, rtol=1e-5)


@given(text=TEXTS)
def test_a_window(text: Text) -> None:
    q, k, v, _, mask = text.draw()
    first = None if mask is None else mask.int().argmax(1)
    n = text.n_prompt
    cache = WindowCache(k[:, :, :n], v[:, :, :n], text.window, 0.5, first)
    found = step_by_step(cache.attend, text, q, k, v)
    ids = torch.zeros(text.batch, text.n_heads, 1, text.seq_len, dtype=torch.uint8)
    rule = WindowRule(text.window, causal=True, sees_self=True)
    expected = reference_attention(q, k, v, ids, rule, scale=0.5, key_padding_mask=mask)
    torch.testing.assert_close(found, expected[:, :, n:], atol=2e-6, rtol=1e-5)


@given(text=TEXTS)
def test_everything(text: Text) -> None:
    q, k, v, _, mask = text.draw()
    first = None if mask is None else mask.int().argmax(1)
    n = text.n_prompt
    cache = ExactCache(k[:, :, :n], v[:, :, :n], first)
    found = step_by_step(cache.attend, text, q, k, v)
    expected = exact_attention(q, k, v, causal=True, key_padding_mask=mask)
    torch.testing.assert_close(found, expected[:, :, n:], atol=2e-6, rtol=1e-5)


def test_in_bfloat16_scores_and_sums_are_float32() -> None:
    text = Text(2, 2, 4, 4, 16, n_prompt=60, n_more=60, head_dim=16, is_padded=True, seed=0)
    q, _, v, ids, mask = text.draw(torch.bfloat16)
    options = AttentionOptions(WindowRule(text.window, causal=True), text.n_buckets, 1.0)
    found = through_buckets(text, options, q, v, ids, mask)
    expected = reference_attention(q, shared_keys(q), v, ids, options.rule, scale=1.0, key_padding_mask=mask)
    assert found.dtype is torch.bfloat16
    # the only difference is one rounding of the result
    torch.testing.assert_close(found, expected[:, :, text.n_prompt :], atol=0, rtol=2**-7)


@pytest.mark.parametrize("rows", [[0, 0, 0], [1, 0], [2], [2, 2, 0, 1, 1]], ids=str)
def test_rows_are_repeated_reordered_and_dropped(rows: list[int]) -> None:
    """Cache entries follow their rows, and copies of one row diverge."""
    text = Text(3, 2, 2, 2, 6, n_prompt=20, n_more=12, head_dim=4, is_padded=True, seed=3)
    q, k, v, ids, mask = text.draw()
    assert mask is not None
    n, half, index = text.n_prompt, text.n_prompt + text.n_more // 2, torch.tensor(rows)
    first = mask.int().argmax(1)
    options = AttentionOptions(WindowRule(text.window, causal=True), text.n_buckets, 1.0)
    caches: list[tuple[Any, tuple[Tensor, ...]]] = [
        (BucketCache(q[:, :, :n], v[:, :, :n], ids[..., :n], options, mask[:, :n]), (q, v, ids.transpose(2, 3))),
        (WindowCache(k[:, :, :n], v[:, :, :n], text.window, 1.0, first), (q, k, v)),
        (ExactCache(k[:, :, :n], v[:, :, :n], first), (q, k, v)),
    ]
    for cache, tensors in caches:

        def attend(*token: Tensor, cache: Any = cache) -> Tensor:
            last = token[-1].transpose(2, 3) if isinstance(cache, BucketCache) else token[-1]
            return cache.attend(*token[:-1], last)

        for place in range(n, half):
            attend(*(x[..., place : place + 1, :] for x in tensors))
        cache.select_rows(index)
        # from here on all rows differ, including copies of one row
        generator = torch.Generator().manual_seed(1)
        moved = [x[index].clone() for x in tensors]
        for x in moved:
            if x.is_floating_point():
                x[:, :, half:] = torch.randn(x[:, :, half:].shape, generator=generator)
        found = torch.cat(
            [attend(*(x[..., p : p + 1, :] for x in moved)) for p in range(half, text.seq_len)], dim=2
        )
        expected = _whole(cache, moved, mask[index], text, options)[:, :, half:]
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def _whole(cache: Any, tensors: list[Tensor], mask: Tensor, text: Text, options: AttentionOptions) -> Tensor:
    if isinstance(cache, BucketCache):
        q, v, ids = tensors
        return reference_attention(
            q, shared_keys(q), v, ids.transpose(2, 3), options.rule, scale=1.0, key_padding_mask=mask
        )
    q, k, v = tensors
    if isinstance(cache, ExactCache):
        return exact_attention(q, k, v, causal=True, key_padding_mask=mask)
    ids = torch.zeros(*q.shape[:2], 1, q.shape[2], dtype=torch.uint8)
    rule = WindowRule(text.window, causal=True, sees_self=True)
    return reference_attention(q, k, v, ids, rule, scale=1.0, key_padding_mask=mask)


def test_a_token_costs_the_same_however_long_the_text() -> None:
    """No tensor allocated by a step grows with the sequence, except when the pool grows."""
    sizes = []
    for n_prompt in (70, 1100):
        text = Text(1, 2, 3, 4, 9, n_prompt=n_prompt, n_more=1, head_dim=8, is_padded=False, seed=0)
        q, _, v, ids, _ = text.draw()
        options = AttentionOptions(WindowRule(text.window, causal=True), 4, 1.0, count_pairs_once=True)
        cache = BucketCache(q[:, :, :-1], v[:, :, :-1], ids[..., :-1], options, None)
        with _Largest() as largest:
            cache.attend(q[:, :, -1:], v[:, :, -1:], ids[..., -1:])
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1] > 0


class _Largest(torch.overrides.TorchFunctionMode):
    """Records the size of the largest tensor that is not a view."""

    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view():
            self.numel = max(self.numel, out.numel())
        return out


def test_a_bucket_attends_to_its_newest_members_alone() -> None:
    """By hand: one bucket, a window of 3 and equal scores yield the mean of the last two values."""
    v = torch.arange(8.0).view(1, 1, 8, 1)
    q = torch.zeros(1, 1, 8, 1)
    ids = torch.zeros(1, 1, 1, 8, dtype=torch.uint8)
    options = AttentionOptions(WindowRule(3, causal=True), 1, 1.0)
    cache = BucketCache(q[:, :, :1], v[:, :, :1], ids[..., :1], options, None)
    outs = [cache.attend(q[:, :, :1], v[:, :, i : i + 1], ids[..., :1]).item() for i in range(1, 8)]
    assert outs == [0.0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
