"""Memory of a decoder's attention to its source: `s` is of the targets on a rank, `t` of the sources."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.config import CrossAttentionKind
from reformer_dist.ops.lsh.cross import DENSE_PAIRS
from reformer_dist.ops.lsh.cross_tiles import CHUNK_SCORES, GROUP_TOKENS
from reformer_dist.planning.activations import SublayerMemory
from reformer_dist.planning.sizes import JobSpec, Sizes

DENSE_WITH_DROPOUT = 16  # bytes of a pair: softmax, factors, their product and the scores


@dataclass(frozen=True)
class CrossAttentionMemory:
    """The sublayer of one layer and micro-batch on one rank."""

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
        """Bucket ids, which a recompute must find again."""
        return self.s.ids + self.t.ids if self._is_lsh else 0

    def saved(self) -> int:
        """What autograd holds of it between its forward and its backward."""
        s, t, model = self.s, self.t, self.job.config.model
        # the source in the dtype of the weights: once, or under autocast for keys and for values
        sources = t.hidden * 2 if self.job.autocasts else t.hidden if t.hidden < t.stream else 0
        inputs = s.hidden + SublayerMemory(self.job, s).norm_saved() + sources
        heads = 2 * s.heads + 2 * t.heads  # q and the output, k and v
        if self._is_lsh:
            heads += t.heads + 2 * t.per_head  # keys before their norm is 1
        if self._is_tiled:
            heads += s.heads  # the output once more, heads side by side
        masks = s.hidden if model.dropout > 0 else 0
        return inputs + heads + s.per_head + self.ids + self._pairs() + masks

    def backward(self) -> int:
        """What comes on top while it goes back: gradients of output, q, k and v, or of the source by k and v."""
        s, t = self.s, self.t
        through_heads = 2 * s.heads + 2 * t.heads + (s.heads if self._is_tiled else 0)
        through_source = s.heads + t.heads + 2 * t.hidden + t.stream
        return SublayerMemory(self.job, s).d_result() + max(through_heads, through_source)

    def workspace(self) -> float:
        """Of tiles: rows in float32 and by slot, their gradients, and three blocks of scores."""
        if not self._is_tiled:
            return 0.0
        n_queries, n_keys = self._lengths
        units = min(self._units, max(1, GROUP_TOKENS[self.job.device] // (n_queries + n_keys)))
        queries, keys = (units * n * self.job.layer_shape.head_dim * 4 for n in (n_queries, n_keys))
        rows = 2 * (queries + 2 * keys) + queries  # q, k, v, their gradients, and that of the output
        slots = 3 * queries + 4 * keys
        return rows + slots + queries + 2 * keys + 3 * CHUNK_SCORES[self.job.device] * 4

    @property
    def _is_lsh(self) -> bool:
        return self.job.config.model.cross_attention is CrossAttentionKind.lsh

    @property
    def _by_pairs(self) -> bool:
        """Whether it runs over buckets, be it a single one, rather than in PyTorch's kernels."""
        return self._is_lsh or self.job.config.model.attention_dropout > 0

    @property
    def _lengths(self) -> tuple[int, int]:
        """Of whole targets and sources: heads are shared among ranks."""
        return self.job.config.data.seq_len, self.encoder.config.data.seq_len

    @property
    def _units(self) -> int:
        shape = self.job.layer_shape
        return shape.rows * shape.n_heads // self.job.config.parallel.sequence

    @property
    def _is_tiled(self) -> bool:
        n_queries, n_keys = self._lengths
        return self._by_pairs and n_queries * n_keys > DENSE_PAIRS

    def _pairs(self) -> int:
        """What short texts keep of every pair."""
        if self._is_tiled or not self._by_pairs:
            return 0
        n_queries, n_keys = self._lengths
        has_dropout = self.job.config.model.attention_dropout > 0
        of_pair = DENSE_WITH_DROPOUT if has_dropout else self.job.layer_shape.element_size
        return self._units * n_queries * n_keys * of_pair
