"""One layer: two residual streams, to which its sublayers add in turn, invertible as a whole.

y1 = x1 + Attention(LN(x2)), y2 = x2 + FeedForward(LN(y1)) (paper, eq. 9). A layer that reads an encoder's output
has a third sublayer between them, and each reads what the one before has written: y1 = x1 + Attention(LN(x2)),
y2 = x2 + CrossAttention(LN(y1)), z1 = y1 + FeedForward(LN(y2)). Its outputs are (y2, z1): the next layer reads z1.

The streams stay float32 whatever the dtype of the weights; the sublayers compute in the weights' dtype, or in
autocast's.
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
from reformer_dist.models.norms import build_norm
from reformer_dist.models.reversible import Sublayer, Tape, TokenwiseSublayer, reversible_steps
from reformer_dist.ops.dropout import token_dropout

Streams = tuple[Tensor, Tensor]


class Block(nn.Module):
    """A layer of the stack; under ZeRO stage 3 it is gathered as a whole."""

    def __init__(self, config: ModelConfig, kind: AttentionKind, *, has_cross_attention: bool = False) -> None:
        super().__init__()
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

        With a tape, backward rebuilds the inputs from the outputs instead of storing them. The streams are
        arguments of their own, since module hooks (ZeRO's) do not look into tuples.
        """
        if context.skips_layer(layer, self.layer_drop):
            return self._skip(x1, x2, context)
        sublayers = self._sublayers(context, layer, cache or RecomputeCache())
        if is_inverse:
            for sublayer in reversed(sublayers):
                x1, x2 = x2 - sublayer(x1), x1
            return x1, x2
        if tape is not None:
            return reversible_steps(x1, x2, sublayers, tape)
        for sublayer in sublayers:
            x1, x2 = x2, x1 + sublayer(x2)
        return x1, x2

    def _skip(self, x1: Tensor, x2: Tensor, context: ForwardContext) -> Streams:
        """The streams as they came, so that the layer below finds on the tape what it has left there."""
        untouched: list[Tensor] = list(self.parameters())
        if self.has_cross_attention:
            assert context.source is not None
            untouched.append(context.source.hidden)
        return left_out(x1, x2, untouched)

    def _sublayers(self, context: ForwardContext, layer: int, cache: RecomputeCache) -> list[Sublayer]:
        dropout = context.dropout(self.dropout)

        def attend(x: Tensor) -> Tensor:
            out = self.attention_norm.after(self.attention(self.attention_norm(x), context, layer, cache))
            return token_dropout(out, dropout, context.seed_for("after_attention", layer), context.coords)

        def read_source(x: Tensor) -> Tensor:
            norm = self.cross_attention_norm
            out = norm.after(self.cross_attention(norm(x), context, layer, cache))
            return token_dropout(out, dropout, context.seed_for("after_cross_attention", layer), context.coords)

        def feed(start: int, x: Tensor) -> Tensor:
            coords = context.coords.chunk(start, start + x.shape[1])
            norm = self.feed_forward_norm
            out = norm.after(self.feed_forward(norm(x), context, layer, coords))
            return token_dropout(out, dropout, context.seed_for("after_feed_forward", layer), coords)

        attention = Sublayer(attend, [*self.attention_norm.parameters(), *self.attention.parameters()])
        feed_weights = [*self.feed_forward_norm.parameters(), *self.feed_forward.parameters()]
        feed_forward = TokenwiseSublayer(feed, feed_weights, self.feed_forward.config.ff_chunk)
        if not self.has_cross_attention:
            return [attention, feed_forward]
        assert context.source is not None
        weights = [*self.cross_attention_norm.parameters(), *self.cross_attention.parameters()]
        return [attention, Sublayer(read_source, [*weights, context.source.hidden]), feed_forward]


def left_out(x1: Tensor, x2: Tensor, untouched: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The streams as they are. What the layer would have used gets gradients of zeros, not none.

    So every rank and ZeRO stage sees the same step: ZeRO's hooks wait for each parameter, and an optimizer that
    passes over parameters without gradients would move them otherwise at some stages than at others.
    """
    y1, y2 = _SkipLayer.apply(x1, x2, *(p for p in untouched if p.requires_grad))
    return y1, y2


class _SkipLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.alike = [(p.shape, p.dtype, p.device) for p in parameters]
        return x1.view_as(x1), x2.view_as(x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.alike)
        return (*grads, *zeros)
