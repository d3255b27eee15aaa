"""Memory of cross attention. `s` are sizes of the targets on a rank, `t` of the sources."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.config import CrossAttentionKind
from reformer_dist.ops.lsh.cross import DENSE_PAIRS
from reformer_dist.ops.lsh.cross_tiles import CHUNK_SCORES, GROUP_TOKENS
from reformer_dist.planning.activations import SublayerMemory
from reformer_dist.planning.sizes import JobSpec, Sizes

DENSE_DROPOUT_PAIR_BYTES = 16  # softmax, dropout factors, their product and the scores


@dataclass(frozen=True)
class CrossAttentionMemory:
    """The cross attention sublayer of one layer for one micro-batch on one rank."""

    job: JobSpec
    encoder: JobSpec

    @property
    def s(self) -> Sizes:
        return Sizes.of(self.job)

    @property
    def t(self) -> Sizes:
        return Sizes.of(self.encoder)

    @property
    def ids(self) -> int:
        """Bucket ids, saved for the recompute."""
        return self.s.ids + self.t.ids if self._is_lsh else 0

    def saved(self) -> int:
        """Tensors saved from forward to backward."""
        s, t, model = self.s, self.t, self.job.config.model
        # the source in the dtype of the weights: one copy, or under autocast one each for keys and values
        sources = t.hidden * 2 if self.job.uses_autocast else t.hidden if t.hidden < t.stream else 0
        inputs = s.hidden + SublayerMemory(self.job, s).norm_saved() + sources
        heads = 2 * s.heads + 2 * t.heads  # q and the output, k and v
        if self._is_lsh:
            heads += t.heads + 2 * t.per_head  # keys before normalization
        if self._is_tiled:
            heads += s.heads  # the output again, with heads concatenated
        masks = s.hidden if model.dropout > 0 else 0
        return inputs + heads + s.per_head + self.ids + self._pairs() + masks

    def backward(self) -> int:
        """Additional memory in backward: gradients of output, q, k and v, or of the source through k and v."""
        s, t = self.s, self.t
        through_heads = 2 * s.heads + 2 * t.heads + (s.heads if self._is_tiled else 0)
        through_source = s.heads + t.heads + 2 * t.hidden + t.stream
        return SublayerMemory(self.job, s).d_result() + max(through_heads, through_source)

    def workspace(self) -> float:
        """Working memory with tiles: float32 rows, copies by slot, their gradients, and three blocks of scores."""
        if not self._is_tiled:
            return 0.0
        n_queries, n_keys = self._lengths
        n_heads = min(self._n_heads, max(1, GROUP_TOKENS[self.job.device] // (n_queries + n_keys)))
        queries, keys = (n_heads * n * self.job.layer_shape.head_dim * 4 for n in (n_queries, n_keys))
        rows = 2 * (queries + 2 * keys) + queries  # q, k, v, their gradients, and that of the output
        slots = 3 * queries + 4 * keys
        return rows + slots + queries + 2 * keys + 3 * CHUNK_SCORES[self.job.device] * 4

    @property
    def _is_lsh(self) -> bool:
        return self.job.config.model.cross_attention is CrossAttentionKind.lsh

    @property
    def _is_bucketed(self) -> bool:
        """Whether attention runs over buckets, possibly a single one, instead of PyTorch's kernels."""
        return self._is_lsh or self.job.config.model.attention_dropout > 0

    @property
    def _lengths(self) -> tuple[int, int]:
        """Lengths of whole targets and sources: ranks divide heads, not tokens."""
        return self.job.config.data.seq_len, self.encoder.config.data.seq_len

    @property
    def _n_heads(self) -> int:
        shape = self.job.layer_shape
        return shape.rows * shape.n_heads // self.job.config.parallel.sequence

    @property
    def _is_tiled(self) -> bool:
        n_queries, n_keys = self._lengths
        return self._is_bucketed and n_queries * n_keys > DENSE_PAIRS

    def _pairs(self) -> int:
        """Dense (query, key) matrices, which short sequences save."""
        if self._is_tiled or not self._is_bucketed:
            return 0
        n_queries, n_keys = self._lengths
        has_dropout = self.job.config.model.attention_dropout > 0
        pair_bytes = DENSE_DROPOUT_PAIR_BYTES if has_dropout else self.job.layer_shape.element_size
        return self._n_heads * n_queries * n_keys * pair_bytes
