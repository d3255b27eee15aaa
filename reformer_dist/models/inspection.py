"""Attention inspection: bucket ids and dense attention weights of every attention layer of a module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reformer_dist.models.attention import SelfAttention
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.context import ForwardContext
from reformer_dist.models.cross_attention import CrossAttention
from reformer_dist.models.encoder_decoder import ReformerEncoderDecoder
from reformer_dist.models.sequence import LayerAccess, SequenceAccess, WholeSequence
from reformer_dist.ops.checks import check_type
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import CrossKeys, CrossOptions, attend_locally, cross_attention
from reformer_dist.ops.lsh.attention import Exchange, LocalExchange

MAX_TOKENS = 4096


@dataclass(frozen=True)
class AttentionView:
    """Attention weights and bucket ids of one call of an attention layer."""

    weights: Tensor
    """[B, H, S, S], or [B, H, S, T] of cross attention to a source: weight of key j for query i, combined over all
    rounds; rows sum to 1."""
    bucket_ids: Tensor | None
    """[B, H, R, S] of an LSH layer, in which a local round is one more round of zeros; None for other kinds."""
    name: str = ""
    """Name of the layer in the module, such as stack.blocks.0.attention, or ..cross_attention of a decoder."""
    key_bucket_ids: Tensor | None = None
    """[B, H, R, T] of the source, of LSH cross attention."""


@torch.no_grad()
def inspect_attention(
    model: nn.Module,
    *inputs: Any,
    key_padding_mask: Tensor | None = None,
    step: int | None = None,
    **keywords: Any,
) -> list[AttentionView]:
    """Attention of every layer, in order of the calls, without dropout.

    model: any module with attention layers of this package. inputs, keywords: those of its forward, such as tokens
    [B, S], and source and tokens of an encoder-decoder, whose encoder comes first. Its decoder layers have two
    views each, of self-attention and of cross attention. key_padding_mask and step, whose hash rotations are used
    (None: those of evaluation), are passed on if they are not None.

    Raises ValueError for more than 4096 tokens, since the weights are dense, and if no attention layer runs.
    """
    check_type("model", model, nn.Module)
    options = {"key_padding_mask": key_padding_mask, "step": step}
    keywords |= {name: value for name, value in options.items() if value is not None}
    views: list[AttentionView] = []
    modes = {module: module.training for module in model.modules()}
    run: Callable[..., Any] = model
    if isinstance(model, ReformerModel) and not isinstance(model, ReformerEncoderDecoder):
        run = model.encode  # without the head, which does not attend to anything
    with ExitStack() as cleanup:
        for name, module in model.named_modules():
            if isinstance(module, SelfAttention | CrossAttention):
                hook = _recording_hook(name, views)
                cleanup.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        try:
            model.eval()
            run(*inputs, **keywords)
        finally:
            for module, was_training in modes.items():
                module.training = was_training
    if not views:
        raise ValueError(f"{type(model).__name__}: no attention layer of reformer_dist ran in its forward")
    return views


def _recording_hook(name: str, views: list[AttentionView]) -> Callable[..., Any]:
    """A forward pre-hook that gives an attention layer a sequence that records it."""

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = args[1] if len(args) > 1 else kwargs.get("context")
        given = kwargs.get("sequence", WholeSequence()) if context is None else context.sequence
        recorder = _RecordingSequence(name, views, given)
        if context is None:
            return args, {**kwargs, "sequence": recorder}
        assert isinstance(context, ForwardContext)
        context = replace(context, sequence=recorder)
        return ((args[0], context, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "context": context})

    return record


class _RecordingSequence(WholeSequence):
    """Computes attention as usual, and again with one-hot values, whose outputs are the weights themselves."""

    def __init__(self, name: str, views: list[AttentionView], given: SequenceAccess) -> None:
        """Raises ValueError if the given sequence, whose place this takes, is not a whole one."""
        if type(given) is not WholeSequence:
            kind = type(given).__name__
            raise ValueError(f"sequence={kind}: attention is inspected on whole sequences only; omit it")
        self._name, self._views = name, views

    def of_layer(self, layer: int) -> LayerAccess:
        return self

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        assert isinstance(exchange, LocalExchange)
        weights = _weights(v, q.shape[2], lambda values: attend_locally(q, k, values, exchange))
        key_ids, query_ids = exchange.bucket_ids, exchange.query_ids
        if query_ids is not None:
            view = AttentionView(weights, query_ids, self._name, key_ids)
        else:
            view = AttentionView(weights, key_ids if k is None else None, self._name)
        self._views.append(view)
        return super().bucket_attention(q, k, v, exchange)

    def exact_attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: ExactOptions, key_padding_mask: Tensor | None
    ) -> Tensor:
        heads = {"first_head": 0, "n_heads": q.shape[1]}
        weights = _weights(v, q.shape[2], lambda values: options.attend(q, k, values, key_padding_mask, **heads))
        self._views.append(AttentionView(weights, None, self._name))
        return super().exact_attention(q, k, v, options, key_padding_mask)

    def cross_attention(
        self,
        q: Tensor,
        query_ids: Tensor | None,
        keys: Callable[[], CrossKeys],
        options: CrossOptions,
        sequence_of_keys: SequenceAccess,
    ) -> Tensor:
        source = keys()
        weights = _weights(
            source.v,
            q.shape[2],
            lambda values: cross_attention(q, query_ids, replace(source, v=values), options),
        )
        self._views.append(AttentionView(weights, query_ids, self._name, source.ids))
        return super().cross_attention(q, query_ids, lambda: source, options, sequence_of_keys)


def _weights(v: Tensor, n_queries: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, H, S, T]: outputs of attention with one-hot values in place of v [B, H, T, D]. Raises ValueError."""
    n_keys, width = v.shape[2:]
    if max(n_queries, n_keys) > MAX_TOKENS:
        problem = f"must be at most {MAX_TOKENS} to inspect attention"
        raise ValueError(f"{max(n_queries, n_keys)} tokens: {problem}")
    n_columns = -(-n_keys // width) * width
    identity = torch.eye(n_keys, n_columns, dtype=v.dtype, device=v.device)
    columns = [attend(part.expand(*v.shape)) for part in identity.split(width, dim=1)]
    return torch.cat(columns, dim=-1)[..., :n_keys]
