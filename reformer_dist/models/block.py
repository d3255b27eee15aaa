"""One reversible layer: sublayers add in turn to two residual streams.

y1 = x1 + Attention(LN(x2)), y2 = x2 + FeedForward(LN(y1)) (paper, eq. 9). A decoder layer with cross attention has
a third sublayer between them, and each sublayer reads the output of the previous one: y1 = x1 + Attention(LN(x2)),
y2 = x2 + CrossAttention(LN(y1)), z1 = y1 + FeedForward(LN(y2)). Its outputs are (y2, z1): the next layer reads z1.

The streams are float32 whatever the dtype of the weights. Sublayers compute in the dtype of the weights, or that
of autocast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from reformer_dist.config import AttentionKind, ModelConfig
from reformer_dist.models.attention import build_attention
from reformer_dist.models.context import ForwardContext, RecomputeCache
from reformer_dist.models.cross_attention import CrossAttention
from reformer_dist.models.feed_forward import FeedForward
from reformer_dist.models.norms import build_norm, norm_of_layer
from reformer_dist.models.recompute import LayerWeights, check_reversible
from reformer_dist.models.reversible import Streams, Sublayer, Tape, TokenwiseSublayer, reversible_steps
from reformer_dist.ops.checks import check_type
from reformer_dist.ops.dropout import token_dropout
from reformer_dist.ops.profiling import part


class Block(nn.Module):
    """A layer of the stack, and the unit that FSDP and ZeRO stage 3 gather: backward runs it as one function."""

    _z3_leaf = True
    """DeepSpeed's mark of a leaf module, which `set_z3_leaf_modules` sets."""

    def __init__(self, config: ModelConfig, kind: AttentionKind, *, has_cross_attention: bool = False) -> None:
        super().__init__()
        check_type("config", config, ModelConfig)
        check_type("kind", kind, AttentionKind)
        check_type("has_cross_attention", has_cross_attention, bool)
        self.dropout, self.layer_drop = config.dropout, config.layer_drop
        self.has_cross_attention = has_cross_attention
        self.attention_norm = build_norm(config)
        self.attention = build_attention(config, kind)
        if has_cross_attention:
            self.cross_attention_norm = build_norm(config)
            self.cross_attention = CrossAttention(config)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        context: ForwardContext,
        layer: int,
        *,
        cache: RecomputeCache | None = None,
        tape: Tape | None = None,
        is_inverse: bool = False,
    ) -> Streams:
        """(x1, x2) -> (y1, y2), each [B, S, dim] float32; with is_inverse, (y1, y2) -> (x1, x2).

        With a tape, backward reconstructs the inputs from the outputs instead of storing them. The streams are
        separate arguments because module hooks (ZeRO's) do not look into tuples.
        """
        if context.skips_layer(layer, self.layer_drop):
            return self._skip(x1, x2, context)
        if cache is None:
            return self._run(x1, x2, self._sublayers(context, layer, RecomputeCache()), tape, is_inverse)
        if cache.weights is None:
            cache.weights = LayerWeights(self)
        with cache.weights.restored():
            return self._run(x1, x2, self._sublayers(context, layer, cache), tape, is_inverse)

    def _run(
        self, x1: Tensor, x2: Tensor, sublayers: list[Sublayer], tape: Tape | None, is_inverse: bool
    ) -> Streams:
        if is_inverse:
            for sublayer in reversed(sublayers):
                x1, x2 = x2 - sublayer(x1), x1
            return x1, x2
        if tape is not None:
            check_reversible(self)
            return reversible_steps(x1, x2, sublayers, tape, LayerWeights(self))
        for sublayer in sublayers:
            x1, x2 = x2, x1 + sublayer(x2)
        return x1, x2

    def _skip(self, x1: Tensor, x2: Tensor, context: ForwardContext) -> Streams:
        """Leaves the streams unchanged, so the tape still holds the outputs of the layer below."""
        unused: list[Tensor] = list(self.parameters())
        if self.has_cross_attention:
            assert context.source is not None
            unused.append(context.source.hidden)
        return skip_layer(x1, x2, unused)

    def _sublayers(self, context: ForwardContext, layer: int, cache: RecomputeCache) -> list[Sublayer]:
        dropout = context.dropout(self.dropout)
        attention_norm = norm_of_layer(self.attention_norm, layer)
        feed_forward_norm = norm_of_layer(self.feed_forward_norm, layer)

        def attend(x: Tensor) -> Tensor:
            with part("projections"):
                out = attention_norm.scale_output(self.attention(attention_norm(x), context, layer, cache))
                return token_dropout(out, dropout, context.seed_for("after_attention", layer), context.coords)

        def cross_attend(x: Tensor) -> Tensor:
            norm = norm_of_layer(self.cross_attention_norm, layer)
            with part("projections"):
                out = norm.scale_output(self.cross_attention(norm(x), context, layer, cache))
                seed = context.seed_for("after_cross_attention", layer)
                return token_dropout(out, dropout, seed, context.coords)

        def feed_forward(start: int, x: Tensor) -> Tensor:
            coords = context.coords.chunk(start, start + x.shape[1])
            with part("feed-forward"):
                out = self.feed_forward(feed_forward_norm(x), context, layer, coords)
                out = feed_forward_norm.scale_output(out)
                return token_dropout(out, dropout, context.seed_for("after_feed_forward", layer), coords)

        weights = [*attention_norm.parameters(), *self.attention.parameters()]
        sublayers = [Sublayer(attend, weights)]
        if self.has_cross_attention:
            assert context.source is not None
            norm = norm_of_layer(self.cross_attention_norm, layer)
            weights = [*norm.parameters(), *self.cross_attention.parameters()]
            sublayers.append(Sublayer(cross_attend, [*weights, context.source.hidden]))
        weights = [*feed_forward_norm.parameters(), *self.feed_forward.parameters()]
        sublayers.append(TokenwiseSublayer(feed_forward, weights, self.feed_forward.config.ff_chunk))
        return sublayers


def skip_layer(x1: Tensor, x2: Tensor, unused: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the streams unchanged; the unused tensors get zero gradients instead of None.

    This keeps steps identical across ranks and ZeRO stages: ZeRO's hooks wait for every parameter, and an
    optimizer that skips parameters without gradients would update them at some stages and not at others.
    """
    y1, y2 = _SkipLayer.apply(x1, x2, *(p for p in unused if p.requires_grad))
    return y1, y2


class _SkipLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor]:
        ctx.unused = [(x.shape, x.dtype, x.device) for x in unused]
        return x1.view_as(x1), x2.view_as(x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.unused)
        return (*grads, *zeros)
