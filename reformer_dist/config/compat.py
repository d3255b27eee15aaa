"""Behavior of other Reformer implementations, for models that were trained with them. See docs/interop.md."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from reformer_dist.config.checks import LARGEST_INT64, ConfigGroup, bounded

LARGEST_CHUNK = 2**14  # short texts are padded to a chunk, and plain PyTorch holds all pairs of one at once


class StreamMerge(Enum):
    mean = "mean"
    concat = "concat"


@dataclass(kw_only=True)
class CompatConfig(ConfigGroup, prefix="model.compat."):
    """model.compat.*: set by the converters. A new model needs none of it."""

    bucket_factors: list[int] | None = None
    """Even numbers whose product is n_buckets, each hashed by a separate argmax; null chooses them."""
    hash_seed: int | None = bounded(None, least=0, most=LARGEST_INT64)
    """All steps and layers use the rotations that Hugging Face draws from this seed; null draws new ones."""
    chunk_wrap: bool = False
    """Chunks: the first chunk of a round attends to the last of the previous round."""
    local_chunk_len: int = bounded(0, least=0, most=LARGEST_CHUNK, hint="layers=[exact] attends to more tokens")
    """Local attention in chunks of this many positions instead of a window; 0 means local_window."""
    local_chunks_before: int = bounded(1, least=0, most=LARGEST_CHUNK)
    """Chunks before its own that a token of a local layer attends to."""
    local_chunks_after: int = bounded(0, least=0, most=LARGEST_CHUNK)
    """Chunks after its own that a token of a local layer attends to; 0 in a causal model."""
    norm_per_layer: bool = False
    """share_layers: each layer has norms of its own, as in reformer_pytorch; only the sublayers are shared."""
    attention_bias: bool = False
    """The output projection of attention has a bias."""
    axial_sum: bool = False
    """axial: the embeddings of the axes are embedding_dim wide and summed instead of concatenated."""
    merge_streams: StreamMerge = StreamMerge.mean
    """Input of the final norm and the head: mean of the two streams, or both concatenated (2 * dim wide)."""
