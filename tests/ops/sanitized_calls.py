"""Runs the native library, compiled with AddressSanitizer, over odd shapes and over refused calls.

LD_PRELOAD=libasan.so python sanitized_calls.py LIBRARY
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention, hash_vectors
from reformer_dist.ops.lsh.hashing import draw_rotations
from reformer_dist.ops.lsh.native import attention, calls
from reformer_dist.ops.lsh.native.attention import NativeBackend
from reformer_dist.ops.lsh.native.library import library

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.shards import attend_by_partition

SHAPES = [(1, 1, 1, 16), (2, 3, 7, 16), (1, 2, 121, 48), (2, 1, 700, 64), (1, 1, 33, 256)]


def use(path: str) -> None:
    """Makes calls use the library at a path."""
    loaded = ctypes.CDLL(path)
    for module in (attention, calls):
        module.library = lambda: loaded
    library.cache_clear()


def attend(
    shape: tuple[int, ...], window: int, n_buckets: int, *, causal: bool, extras: bool, own_keys: bool
) -> None:
    """Hashes, and attends forward and backward; extras: dropout, counting pairs once, padding and rows."""
    batch, n_heads, seq_len, head_dim = shape
    q, k, v = (torch.randn(shape).requires_grad_() for _ in range(3))
    rotations = draw_rotations(n_heads, head_dim, 3, n_buckets, "rotation", seed=0)
    ids = hash_vectors(q, rotations, n_buckets, "rotation", backend="native")
    more = {"count_pairs_once": True, "dropout": 0.3, "rows": torch.arange(batch)} if extras else {}
    if extras:
        more["document_ids"] = (torch.rand(batch, seq_len) < 0.1).long().cumsum(dim=1)
    options = AttentionOptions(WindowRule(window, causal), n_buckets, scale=1.0, backend="native", **more)
    mask = torch.rand(batch, seq_len) < 0.7 if extras else None
    bucket_attention(q, k if own_keys else None, v, ids, options, mask).sum().backward()
    if own_keys:  # in buckets of their own
        options = replace(options, rule=WindowRule(window, causal, sees_self=True), own_keys=True)
        bucket_attention(q, k, v, ids, options, mask, ids.flip(-1)).sum().backward()


def attend_shards() -> None:
    q, v = torch.randn(2, 1, 2, 300, 16).unbind()
    ids = torch.randint(0, 4, (1, 2, 2, 300))
    documents = torch.arange(300).unsqueeze(0) // 40
    options = AttentionOptions(
        WindowRule(20, True), 4, scale=1.0, dropout=0.1, backend="native", document_ids=documents
    )
    attend_by_partition(q, None, v, ids, options, None, torch.ones_like(v), 3)
    options = replace(options, own_keys=True)
    attend_by_partition(q, q, v, ids, options, None, torch.ones_like(v), 3, ids.flip(-1))


def refuse() -> int:
    """Makes calls that would read or write out of bounds; returns how many, all refused."""
    q = torch.randn(1, 2, 77, 16)
    ids = torch.zeros(1, 2, 2, 77, dtype=torch.int32)
    options = AttentionOptions(WindowRule(8, True), 4, scale=1.0, dropout=0.1, backend="native")
    wrong = [
        (q, q[:, :1], ids), (q, q[:, :, :70], ids), (q, q[..., :8], ids), (q.repeat(2, 1, 1, 1), q, ids),
        (q, q, ids[..., :70]), (q, q, ids[:, :1]), (q, q, ids + 5), (q, q, ids - 1), (q, q.long(), ids),
    ]  # fmt: skip
    rows = torch.zeros(5, 16)
    wrong_rows = [(rows, rows[:4], torch.zeros(5)), (rows.T, rows.T, torch.zeros(16)), (rows, rows, rows[0])]
    for queries, values, buckets in wrong:
        refused(bucket_attention, queries, None, values, buckets, options)
    for arguments in wrong_rows:
        refused(calls.row_dot, *arguments)
    return len(wrong) + len(wrong_rows)


def refused(function: Callable[..., object], *arguments: object) -> None:
    try:
        function(*arguments)
    except ValueError:
        return
    raise AssertionError(f"{function.__name__} accepted {arguments}")


def main() -> None:
    use(sys.argv[1])
    torch.manual_seed(0)
    n_calls = 0
    for shape, window, n_buckets in product(SHAPES, (1, 5, 300), (1, 2, 48)):
        for causal, extras, own_keys in product((False, True), repeat=3):
            attend(shape, window, n_buckets, causal=causal, extras=extras, own_keys=own_keys)
            n_calls += 1
    attend_shards()
    NativeBackend(None, None).row_dot(*torch.randn(2, 1, 3, 5, 16).unbind())
    print(f"{n_calls} calls, {refuse()} refused")


if __name__ == "__main__":
    main()
