"""Cross attention from a decoder to the encoder output, exact or LSH."""

from __future__ import annotations

from torch import Tensor, nn

from reformer_dist.config import AttentionBackend, CrossAttentionKind, ModelConfig
from reformer_dist.models.attention import hash_heads
from reformer_dist.models.context import EncodedSource, ForwardContext, RecomputeCache
from reformer_dist.ops.lsh import CrossKeys, CrossOptions
from reformer_dist.ops.lsh.shared_keys import shared_keys
from reformer_dist.ops.profiling import part
from reformer_dist.seeds import derive_seed


class CrossAttention(nn.Module):
    """Multi-head attention with queries of the target and keys and values of the source.

    Exact: softmax(q k / sqrt(D)) over the whole source. LSH: keys are normalized, queries and keys are hashed with
    the same rotations, and a query attends to the keys of its bucket in each round. Rotary positions are not
    applied, since positions of two sequences have no meaningful distance.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.is_exact = config.cross_attention is CrossAttentionKind.exact
        self.n_heads, self.head_dim = config.n_heads, config.resolved_head_dim
        inner = self.n_heads * self.head_dim
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_k = nn.Linear(config.dim, inner, bias=False)
        self.to_v = nn.Linear(config.dim, inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=config.compat.attention_bias)

    def forward(self, x: Tensor, context: ForwardContext, layer: int, cache: RecomputeCache) -> Tensor:
        """[B, S, dim] -> [B, S, dim], attending to context.source; `cache` as in `SelfAttention`."""
        source = context.source
        assert source is not None
        seed = derive_seed("cross rotations", context.rotation_seed, layer)
        q = self._heads(self.to_q(x))
        query_ids = self._hash(q, seed, layer, cache.query_ids)

        def keys() -> CrossKeys:
            return self._keys(source, seed, layer, cache)

        access, options = context.sequence.of_layer(layer), self._options(context, layer)
        with part("attend"):
            out = access.cross_attention(q, query_ids, keys, options, source.sequence)
        return self.to_out(out.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))

    def _keys(self, source: EncodedSource, seed: int, layer: int, cache: RecomputeCache) -> CrossKeys:
        with part("projections"):
            hidden = source.hidden.to(self.to_k.weight.dtype)
            k, v = self._heads(self.to_k(hidden)), self._heads(self.to_v(hidden))
            k = k if self.is_exact else shared_keys(k)
        return CrossKeys(k, v, self._hash(k, seed, layer, cache.key_ids), source.key_padding_mask)

    def _hash(self, vectors: Tensor, seed: int, layer: int, cached: dict[int, Tensor]) -> Tensor | None:
        if self.is_exact:
            return None
        if layer not in cached:
            cached[layer] = hash_heads(vectors, self.config, seed)
        return cached[layer]

    def _options(self, context: ForwardContext, layer: int) -> CrossOptions:
        config = self.config
        return CrossOptions(
            n_buckets=1 if self.is_exact else config.n_buckets,
            scale=self.head_dim**-0.5 if self.is_exact else config.qk_scale,
            count_pairs_once=config.count_pairs_once,
            dropout=context.dropout(config.attention_dropout),
            dropout_seed=context.seed_for("cross_attention", layer),
            rows=context.coords.rows,
            is_reference=config.attention_backend is AttentionBackend.reference,
        )

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H * D] -> [B, H, S, D]."""
        return x.view(x.shape[0], x.shape[1], self.n_heads, self.head_dim).transpose(1, 2)
