"""Activation memory of a layer's sublayers in forward and backward, by the tensors that autograd saves."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.config import Activation, AttentionKind, Norm, Recompute
from reformer_dist.planning.sizes import JobSpec, Sizes, n_convolutions, n_projections

# bytes per element of the int32 temporaries while a dropout mask is drawn
MASK_DRAW_BYTES = 12


@dataclass(frozen=True)
class SublayerMemory:
    """Attention and feed-forward of one micro-batch on one rank."""

    job: JobSpec
    sizes: Sizes

    def attention_saved(self, kind: AttentionKind) -> int:
        """Tensors of an attention sublayer saved from forward to backward."""
        s, n_read = self.sizes, n_projections(self.job.config.model, kind)
        inputs = s.hidden * (n_read if self.job.uses_autocast else 1) + self.norm_saved()
        n_convolved = n_convolutions(self.job.config.model, kind)
        heads = s.heads * (n_read + 1 + n_convolved)  # q, k, v and the output; q and k before their convolutions
        if kind is not AttentionKind.exact and self.job.config.model.n_heads > 1:
            heads += s.heads  # the output again, with heads concatenated
        ids = s.layer_ids if kind is AttentionKind.lsh else 0
        pairs = self._pair_mask() if kind is AttentionKind.exact else 0
        return inputs + heads + s.per_head + ids + pairs + self._mask(s.hidden, self.job.config.model.dropout)

    def attention_backward(self, kind: AttentionKind) -> int:
        """Additional memory during the backward of attention, less what has been freed by then."""
        s, model = self.sizes, self.job.config.model
        freed = self._mask(s.hidden, model.dropout)
        if kind is not AttentionKind.exact and model.n_heads > 1:
            freed += s.heads
        d_output = s.heads * (2 if model.n_heads > 1 else 1)  # as received, and split into heads
        return self.d_result() + d_output + s.heads * n_projections(model, kind) - freed

    def feed_forward_saved(self) -> int:
        """Tensors of a feed-forward sublayer saved from forward to backward, for all tokens."""
        s, model = self.sizes, self.job.config.model
        inner = s.inner * (4 if model.activation.is_gated else 1 if model.activation is Activation.relu else 2)
        if model.ff_dropout:
            inner += s.inner * (2 if model.activation is Activation.relu else 1)
        return s.hidden + self.norm_saved() + inner + self._mask(s.hidden, model.dropout)

    def feed_forward_backward(self) -> int:
        """Additional peak memory in its backward, less what has been freed by then."""
        s, model = self.sizes, self.job.config.model
        grads = 3 if model.activation.is_gated else 2 if model.activation is Activation.relu else 1
        fraction = self._chunk_fraction()
        if model.ff_dropout:
            draw = s.tokens * model.resolved_ff_dim * MASK_DRAW_BYTES - s.inner
            return max(self.d_result() + int(s.inner * grads * fraction), int(draw * fraction))
        return self.d_result() + int(s.inner * grads * fraction) - self._mask(s.hidden, model.dropout)

    def feed_forward_recompute(self) -> int:
        """Saved tensors of the chunk being recomputed, and the input gradients of the previous chunks."""
        fraction = self._chunk_fraction()
        return int(self.feed_forward_saved() * fraction) + (self.sizes.stream if fraction < 1 else 0)

    def _pair_mask(self) -> int:
        """Additive attention mask of exact attention, if rows are padded."""
        shape, seq_len = self.job.layer_shape, self.job.config.data.seq_len
        return shape.rows * seq_len**2 * shape.element_size if self.job.is_masked else 0

    def norm_saved(self) -> int:
        """Tensors that a sublayer's norm saves besides its output."""
        s, norm = self.sizes, self.job.config.model.norm
        if norm is Norm.rezero:
            # the sublayer's output, for the gradient of its scale; in float32 its input is the stream itself
            return 0 if s.hidden == s.stream and not self.job.uses_autocast else s.hidden
        if norm is Norm.rms:  # a normalized copy; PyTorch's fused kernel on GPUs keeps less
            return s.stream + s.statistics // 2
        return s.statistics if norm is Norm.layer else s.statistics * 3 // 2

    @property
    def result(self) -> int:
        """The output of a sublayer."""
        return self.sizes.hidden

    def d_result(self) -> int:
        """Gradient of a sublayer's output, if it is a tensor separate from that of the stream."""
        s, model = self.sizes, self.job.config.model
        masked = s.hidden if model.dropout > 0 else 0
        return masked + (s.hidden if s.hidden < s.stream else 0)

    def _chunk_fraction(self) -> float:
        model, slice_len = self.job.config.model, self.job.layer_shape.slice_len
        if model.recompute is not Recompute.reversible:
            return 1.0
        return min(1.0, (model.ff_chunk or slice_len) / slice_len)

    @staticmethod
    def _mask(size: int, dropout: float) -> int:
        return size if dropout > 0 else 0
