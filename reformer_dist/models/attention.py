"""The three kinds of self-attention of a layer: LSH (shared query-key), local and exact.

Each maps [B, S, dim] to [B, S, dim]: projections to and from heads, around the attention in `ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from reformer_dist.config import AttentionKind, ModelConfig
from reformer_dist.errors import ConfigError
from reformer_dist.models.context import (
    ForwardContext,
    ForwardOptions,
    RecomputeCache,
    build_context,
    call_options,
    refuse_options,
)
from reformer_dist.models.inputs import check_vectors
from reformer_dist.models.layer_rule import LayerRule
from reformer_dist.models.short_conv import ShortConv, convolve
from reformer_dist.models.training_steps import CountsSteps, draws_rotations
from reformer_dist.ops.checks import check_integer, check_type
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, draw_rotations, hash_vectors, seeded_rotations
from reformer_dist.ops.lsh.attention import Exchange
from reformer_dist.ops.lsh.backends import unsupported_reason
from reformer_dist.ops.lsh.hashing import draw_rotations_ahead, single_bucket_ids
from reformer_dist.ops.lsh.next_values import zero_padding, zero_starts
from reformer_dist.ops.profiling import part
from reformer_dist.ops.rotary import rotate
from reformer_dist.seeds import derive_seed


def build_attention(config: ModelConfig, kind: AttentionKind) -> SelfAttention:
    """The attention of one layer."""
    if kind is AttentionKind.exact:
        return ExactSelfAttention(config)
    return LSHSelfAttention(config) if kind is AttentionKind.lsh else LocalSelfAttention(config)


class SelfAttention(CountsSteps):
    """Projections to and from heads; subclasses implement the attention of the heads."""

    kinds: Sequence[AttentionKind] = ()
    """[lsh] if it hashes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_type("config", config, ModelConfig)
        self.config = config
        self.n_heads, self.head_dim = config.n_heads, config.resolved_head_dim
        inner = self.n_heads * self.head_dim
        self.has_own_keys = AttentionKind.lsh not in self.kinds or not config.shared_qk
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        if self.has_own_keys:
            self.to_k = nn.Linear(config.dim, inner, bias=False)
        self.n_value_heads = 1 if config.one_value_head else self.n_heads
        self.to_v = nn.Linear(config.dim, self.n_value_heads * self.head_dim, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=config.compat.attention_bias)

    def forward(
        self,
        x: Tensor,
        context: ForwardContext | None = None,
        layer: int = 0,
        cache: RecomputeCache | None = None,
        **options: Unpack[ForwardOptions],
    ) -> Tensor:
        """[B, S, dim] -> [B, S, dim].

        layer: index, from which rotations and dropout masks are seeded. In a stack, `context` is that of the
        forward call, and `cache` is filled by the first run and read by a recompute. A standalone layer is called
        without them, as in `layer(x, key_padding_mask=mask, step=step)`.
        """
        if context is not None:
            refuse_options(options)
        else:
            draws = draws_rotations(self.config, self.kinds)
            options = call_options(self, options, draws_rotations=draws)
            check_vectors(x, self.config.dim, options)
            check_integer("layer", layer)
            n_tokens, is_training = x.shape[1], self.training
            context = build_context(self.config, 0, n_tokens, x.device, options, is_training=is_training)
        q, *keys = map(self._heads, self._project(x, context, layer))
        k = keys[0] if keys else q
        v = self._heads(self.to_v(x)).expand(-1, self.n_heads, -1, -1)
        out = self._attend(q, k, v, context, layer, cache)
        return self.to_out(out.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))

    def _project(self, x: Tensor, context: ForwardContext, layer: int) -> list[Tensor]:
        """Queries, and keys if they have a projection of their own: [B, S, H * D] each."""
        return [self.to_q(x), self.to_k(x)] if self.has_own_keys else [self.to_q(x)]

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H * D] -> [B, H, S, D]."""
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, layer: int, cache: RecomputeCache | None
    ) -> Tensor:
        """Outputs of the heads, [B, H, S, D]."""
        raise NotImplementedError

    def _rotate(self, kind: AttentionKind, context: ForwardContext, *vectors: Tensor) -> list[Tensor]:
        """Queries and keys [B, H, S, D] with rotary positions, in layers of a kind that has them."""
        if context.rotary is None or kind not in self.config.rotary_layers:
            return list(vectors)
        return [rotate(x, *context.rotary) for x in vectors]

    def _options(self, kind: AttentionKind, context: ForwardContext, layer: int) -> AttentionOptions:
        """Options of LSH or local attention."""
        config, rule, is_lsh = self.config, LayerRule.of(self.config, kind), kind is AttentionKind.lsh
        scale = config.qk_scale if rule.shares_keys else self.head_dim**-0.5
        return AttentionOptions(
            rule=rule.rule,
            n_buckets=rule.n_buckets,
            scale=scale,
            own_keys=rule.own_buckets,
            count_pairs_once=is_lsh and config.count_pairs_once,
            next_value_heads=config.next_value_heads if is_lsh else 0,
            dropout=context.dropout(config.attention_dropout),
            dropout_seed=context.seed_for("attention", layer),
            rows=context.coords.rows,
            backend=config.attention_backend.name,
            document_ids=context.document_ids,
        )

    @staticmethod
    def _get_exchange(
        bucket_ids: Callable[[], tuple[Tensor, Tensor | None]],
        options: AttentionOptions,
        context: ForwardContext,
        layer: int,
        cache: RecomputeCache | None,
    ) -> Exchange:
        """The exchange of this call; a recompute reuses that of the first run, with its bucket ids.

        bucket_ids: of the keys, and of the queries if they differ, see `SequenceAccess.make_exchange`.
        """
        if cache is not None and layer in cache.exchanges:
            return cache.exchanges[layer]
        key_ids, query_ids = bucket_ids()
        exchange = context.sequence.make_exchange(key_ids, options, context.key_padding_mask, query_ids)
        if cache is not None:
            cache.exchanges[layer] = exchange
        return exchange


class LSHSelfAttention(SelfAttention):
    """Attention within buckets, with a shared query-key k = q / |q| (paper, section 2) or keys of their own."""

    kinds = (AttentionKind.lsh,)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.qk_conv:
            inner = self.n_heads * self.head_dim
            self.q_conv = ShortConv(inner, config.qk_conv)
            if self.has_own_keys:
                self.k_conv = ShortConv(inner, config.qk_conv)

    def _project(self, x: Tensor, context: ForwardContext, layer: int) -> list[Tensor]:
        projections = super()._project(x, context, layer)
        if not self.config.qk_conv:
            return projections
        convs = [self.q_conv, self.k_conv] if self.has_own_keys else [self.q_conv]
        access = context.sequence.of_layer(layer)
        return convolve(convs, projections, access, context.key_padding_mask, context.conv_document_ids)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, layer: int, cache: RecomputeCache | None
    ) -> Tensor:
        options = self._options(AttentionKind.lsh, context, layer)
        own = self.has_own_keys

        def bucket_ids() -> tuple[Tensor, Tensor | None]:
            query_ids = self._hash(q, context, layer)
            key_ids = self._hash(k, context, layer) if own else query_ids
            self._collect_stats(key_ids, context)
            return self._add_local_round(key_ids), self._add_local_round(query_ids) if own else None

        exchange = self._get_exchange(bucket_ids, options, context, layer, cache)
        q, *keys = self._rotate(AttentionKind.lsh, context, *((q, k) if own else (q,)))
        if options.next_value_heads:
            v = zero_padding(v, context.key_padding_mask)
            v = zero_starts(v, options.next_value_heads, context.document_starts)
        return context.sequence.of_layer(layer).bucket_attention(q, keys[0] if own else None, v, exchange)

    def _hash(self, vectors: Tensor, context: ForwardContext, layer: int) -> Tensor:
        """Bucket ids [B, H, R, S] of queries or keys, which have the same rotations."""
        seeds = (context.rotation_seed, context.next_rotation_seed)
        seed, following = (None if x is None else derive_seed("rotations", x, layer) for x in seeds)
        assert seed is not None
        return hash_heads(vectors, self.config, seed, following)

    def _collect_stats(self, key_ids: Tensor, context: ForwardContext) -> None:
        if context.bucket_stats is not None:
            sizes = self.config.n_buckets, self.config.window
            context.bucket_stats.append(context.sequence.bucket_stats(key_ids, *sizes))

    def _add_local_round(self, bucket_ids: Tensor) -> Tensor:
        """With a last round in which all tokens share bucket 0."""
        return F.pad(bucket_ids, (0, 0, 0, 1)) if self.config.local_round else bucket_ids


class LocalSelfAttention(SelfAttention):
    """Attention to the nearest positions, including its own: one bucket, one round, separate keys."""

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, layer: int, cache: RecomputeCache | None
    ) -> Tensor:
        q, k = self._rotate(AttentionKind.local, context, q, k)
        options = self._options(AttentionKind.local, context, layer)
        exchange = self._get_exchange(lambda: (single_bucket_ids(q), None), options, context, layer, cache)
        return context.sequence.of_layer(layer).bucket_attention(q, k, v, exchange)


class ExactSelfAttention(SelfAttention):
    """Attention to all positions (or all earlier ones), through PyTorch's kernels."""

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, layer: int, cache: RecomputeCache | None
    ) -> Tensor:
        q, k = self._rotate(AttentionKind.exact, context, q, k)
        options = ExactOptions(
            causal=self.config.causal,
            dropout=context.dropout(self.config.attention_dropout),
            seed=context.seed_for("attention", layer),
            rows=context.coords.rows,
            document_ids=context.document_ids,
        )
        with part("attend"):
            return context.sequence.of_layer(layer).exact_attention(q, k, v, options, context.key_padding_mask)


def check_attention_backend(config: ModelConfig, device: torch.device) -> None:
    """Raises ConfigError if model.attention_backend can't run on the device."""
    kinds = set(config.layer_kinds())
    if kinds == {AttentionKind.exact}:
        return
    name = config.attention_backend.name
    rules = [LayerRule.of(config, kind).rule for kind in kinds - {AttentionKind.exact}]
    chunks = any(isinstance(rule, ChunkRule) for rule in rules)
    reason = unsupported_reason(name, device, config.resolved_head_dim, chunks=chunks)
    if reason is not None:
        raise ConfigError(f"model.attention_backend={name}: {reason}")


def hash_heads(vectors: Tensor, config: ModelConfig, seed: int, next_seed: int | None = None) -> Tensor:
    """Bucket ids [B, H, R, S] of vectors [B, H, S, D]; config.compat.hash_seed overrides the seed of rotations.

    next_seed: of the next training step, whose rotations are then drawn in the background if vectors are on a GPU,
    while the host has little else to do.
    """
    scheme, backend = config.hash_scheme.name, config.attention_backend.name
    factors = None if config.compat.bucket_factors is None else tuple(config.compat.bucket_factors)
    sizes = (vectors.shape[1], vectors.shape[3], config.n_hashes, config.n_buckets)
    with part("hash"):
        if config.compat.hash_seed is not None:
            rotations = seeded_rotations(*sizes, config.compat.hash_seed, factors=factors)
        else:
            rotations = draw_rotations(*sizes, scheme, seed, factors=factors)
            if next_seed is not None and vectors.is_cuda:
                draw_rotations_ahead(*sizes, scheme, next_seed, factors=factors)
        return hash_vectors(vectors, rotations, config.n_buckets, scheme, factors=factors, backend=backend)
