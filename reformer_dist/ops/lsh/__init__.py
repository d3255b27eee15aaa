"""LSH attention. `reference` defines it, `backends` selects how it is computed."""

from reformer_dist.ops.lsh.backends import attend_locally, bucket_attention, hash_vectors
from reformer_dist.ops.lsh.cross import CrossKeys, cross_attention
from reformer_dist.ops.lsh.functional import lsh_attention
from reformer_dist.ops.lsh.hashing import draw_rotations, seeded_rotations
from reformer_dist.ops.lsh.neighbour_rules import ChunkRule, Rule, WindowRule
from reformer_dist.ops.lsh.options import AttentionOptions, CrossOptions

__all__ = [
    "AttentionOptions",
    "ChunkRule",
    "CrossKeys",
    "CrossOptions",
    "Rule",
    "WindowRule",
    "attend_locally",
    "bucket_attention",
    "cross_attention",
    "draw_rotations",
    "hash_vectors",
    "lsh_attention",
    "seeded_rotations",
]
