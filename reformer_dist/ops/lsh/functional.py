"""LSH attention as one function of queries and values, for use without any module."""

from __future__ import annotations

from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_integer, check_type
from reformer_dist.ops.lsh.attention import LocalExchange
from reformer_dist.ops.lsh.backends import attend_locally, hash_vectors
from reformer_dist.ops.lsh.hashing import LARGEST_SIZE, draw_rotations
from reformer_dist.ops.lsh.neighbour_rules import WindowRule
from reformer_dist.ops.lsh.options import AttentionOptions


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    n_hashes: int = 4,
    n_buckets: int = 64,
    window: int = 64,
    causal: bool = True,
    seed: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    scale: float = 1.0,
    hash_scheme: str = "rotation",
    count_pairs_once: bool = False,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Shared query-key attention within buckets, by the window rule: [B, H, S, D] like v.

    qk, v [B, H, S, D], of any length S; keys are qk / |qk|, and logits scale * q.k. In each of n_hashes rounds
    a token attends to the members of its bucket at a sorted distance below `window`, earlier ones only if causal.
    A token without keys attends to itself. seed: of the hash rotations; should differ between layers and training
    steps. key_padding_mask [B, S]: True for real tokens. document_ids [B, S]: integers that do not decrease along
    a row; tokens attend to those of their own document only. dropout: of attention weights, with masks that are a
    function of dropout_seed. n_buckets: 1 or even. backend: auto, triton, native, torch or reference. Time and
    memory grow with S * n_hashes * window.

    Raises ValueError for tensors of other shapes, dtypes or devices, and for numbers out of range.
    """
    checks = TensorChecks()
    checks.floats("qk", qk, "B H S D")
    checks.floats("v", v, "B H S D")
    checks.mask("key_padding_mask", key_padding_mask, "B S")
    check_integer("n_hashes", n_hashes, least=1, most=LARGEST_SIZE)
    check_integer("seed", seed, least=-(2**63), most=2**64 - 1)
    check_type("hash_scheme", hash_scheme, str)
    options = AttentionOptions(
        rule=WindowRule(window, causal),
        n_buckets=n_buckets,
        scale=scale,
        count_pairs_once=count_pairs_once,
        dropout=dropout,
        dropout_seed=dropout_seed,
        backend=backend,
        document_ids=document_ids,
    )
    rotations = draw_rotations(qk.shape[1], qk.shape[3], n_hashes, n_buckets, hash_scheme, seed)
    bucket_ids = hash_vectors(qk, rotations, n_buckets, hash_scheme, backend=backend)
    return attend_locally(qk, None, v, LocalExchange(bucket_ids, options, key_padding_mask))
