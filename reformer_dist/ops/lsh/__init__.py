"""LSH attention: hash, lay out, attend. `reference` says what it means; `attention` is how it is done."""

from reformer_dist.ops.lsh.attention import bucket_attention
from reformer_dist.ops.lsh.hashing import draw_rotations, hash_vectors
from reformer_dist.ops.lsh.rules import AttentionOptions, ChunkRule, Rule, WindowRule

__all__ = [
    "AttentionOptions",
    "ChunkRule",
    "Rule",
    "WindowRule",
    "bucket_attention",
    "draw_rotations",
    "hash_vectors",
]
