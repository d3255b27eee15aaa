"""Import of language models of reformer_pytorch: the state dict of a `ReformerLM` and its constructor arguments.

A state dict has no options, so a config.json next to it holds ReformerLM's keyword arguments as a JSON object.
Written for reformer_pytorch 1.4.4; docs/interop.md lists what is equal.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_dist.config import (
    Activation,
    AttentionKind,
    CompatConfig,
    ModelConfig,
    NeighbourRule,
    Norm,
    Position,
)
from reformer_dist.errors import CheckpointError
from reformer_dist.interop.foreign import (
    CONFIG_FILE,
    ForeignModel,
    ForeignOptions,
    ForeignTensors,
    HeadKind,
    parameter_shapes,
    reshape_checked,
)
from reformer_dist.models import ReformerLM

SYSTEM = "reformer_pytorch"
FLOAT = (int, float)
# (only supported value, reason)
WITHOUT_COUNTERPART: dict[str, tuple[Any, str]] = {
    "n_local_attn_heads": (0, "heads of a layer are of one kind here; local attention has its own layers"),
    "num_mem_kv": (0, "every key here belongs to a token; there are no memory keys"),
    "pkm_layers": ([], "there are no product-key memories here"),
    "ff_activation": (None, "a class can't be written in JSON; must be absent, for GELU"),
    "return_embeddings": (False, "a model without a head can't be used here; must be false"),
}
# options that change the implementation or training only
WITHOUT_EFFECT = (
    "ff_chunks",
    "attn_chunks",
    "post_attn_dropout",
    "random_rotations_per_head",
    "reverse_thres",
    "pkm_num_keys",
)


def read(directory: Path) -> ForeignModel:
    """Reads a directory with config.json and model.safetensors. Raises CheckpointError."""
    options = ForeignOptions.read(directory / CONFIG_FILE)
    notes: list[str] = []
    options.refuse_other_values(WITHOUT_COUNTERPART)
    for name in WITHOUT_EFFECT:
        options.take(name)
    if options.take("full_attn_thres", 0):
        notes.append("full_attn_thres: inputs up to that length use exact attention there, and LSH attention here")
    tensors = ForeignTensors(directory)
    model = _Model(options, _State(tensors), notes)
    options.refuse_unknown("ReformerLM of reformer_pytorch")
    return ForeignModel(SYSTEM, HeadKind.language_model, model.config, model.vocab_size, model.weights(), notes)


class _State:
    """Tensors by their names in a ReformerLM, without the prefix of a wrapper."""

    def __init__(self, tensors: ForeignTensors) -> None:
        self._tensors = tensors
        inner = next((name for name in sorted(tensors.names()) if name.endswith("token_emb.weight")), None)
        if inner is None:
            expected = "must be the state dict of a ReformerLM; a bare Reformer has no vocabulary"
            raise CheckpointError(f"{tensors.directory}: has no token_emb.weight: {expected}")
        self._prefix = inner.removesuffix("token_emb.weight")
        self.directory, self._taken = tensors.directory, set[str]()

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors.names()

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._taken.add(self._prefix + name)
        return reshape_checked(self._tensors.get(self._prefix + name), shape, name, self.directory)

    def refuse_unread(self) -> None:
        """Refuses tensors that were not read, except duplicates of layers and rotary frequencies."""
        redundant = (".irrev_blocks.", "inv_freq")
        unread = self._tensors.names() - self._taken
        unread = {name for name in unread if not any(part in name for part in redundant)}
        if unread:
            problem = "is not in the model its options describe"
            raise CheckpointError(f"{self.directory}: tensor {min(unread)} {problem}")


class _Model:
    def __init__(self, options: ForeignOptions, state: _State, notes: list[str]) -> None:
        self._state = state
        self.vocab_size: int = options.require("num_tokens", int)
        self.max_seq_len: int = options.require("max_seq_len", int)
        self.ties_embedding = bool(options.take("weight_tie_embedding", False))
        self.bucket_size: int = options.take("bucket_size", 64, kind=int)
        kinds = {"axial": Position.axial, "absolute": Position.learned, "fixed": Position.sinusoidal}
        chosen = [kind for name, kind in kinds.items() if options.take(f"{name}_position_emb", False)]
        self.position = chosen[0] if chosen else Position.rotary
        self.axial_shape = options.take("axial_position_shape", None) or [
            math.ceil(self.max_seq_len / self.bucket_size),
            self.bucket_size,
        ]
        self.config = self._config(options, notes)

    def _config(self, options: ForeignOptions, notes: list[str]) -> ModelConfig:
        dim: int = options.require("dim", int)
        n_heads: int = options.take("heads", 8, kind=int)
        head_dim: int = options.take("dim_head", 64, kind=(int, type(None))) or dim // n_heads
        emb_dim: int = options.take("emb_dim", None, kind=(int, type(None))) or dim
        shares_layers: bool = options.take("weight_tie", False, kind=bool)
        layer_drop = float(options.take("layer_dropout", 0.0, kind=FLOAT))
        if layer_drop:
            notes.append("layer_dropout: if all layers are dropped in a step, the first one still runs there only")
        use_full = bool(options.take("use_full_attn", False))
        if use_full and self.position is Position.rotary:
            reason = "its exact attention ignores rotary positions; needs another kind of position"
            options.refuse("use_full_attn", reason)
        n_hashes: int = options.take("n_hashes", 4, kind=int)
        attention = self._exact_attention() if use_full else self._chunked_attention(n_hashes, notes)
        compat = attention.pop("compat", CompatConfig())
        return ModelConfig(
            dim=dim,
            n_layers=options.require("depth", int),
            n_heads=n_heads,
            head_dim=head_dim,
            embedding_dim=None if emb_dim == dim else emb_dim,
            norm=_norm(options),
            layer_drop=layer_drop,
            share_layers=shares_layers,
            one_value_head=options.take("one_value_head", False, kind=bool),
            layers=[AttentionKind.lsh],
            causal=options.take("causal", False, kind=bool),
            qk_scale=head_dim**-0.5,
            ff_mult=options.take("ff_mult", 4, kind=int),
            activation=Activation.glu if options.take("ff_glu", False) else Activation.gelu,
            position=self.position,
            axial_shape=list(self.axial_shape),
            max_seq_len=self.max_seq_len,
            attention_dropout=float(options.take("lsh_dropout", 0.0, kind=FLOAT)),
            ff_dropout=float(options.take("ff_dropout", 0.0, kind=FLOAT)),
            compat=replace(
                compat,
                attention_bias=True,
                axial_sum=self.position is Position.axial,
                norm_per_layer=shares_layers,
            ),
            **attention,
        )

    def _chunked_attention(self, n_hashes: int, notes: list[str]) -> dict[str, Any]:
        n_buckets = max(2, 2 * (self.max_seq_len // (2 * self.bucket_size)))
        notes.append(
            f"n_buckets={n_buckets} is set for max_seq_len={self.max_seq_len} tokens; reformer_pytorch uses each "
            f"input's length / bucket_size: for inputs of S tokens, set model.n_buckets=S/{self.bucket_size} "
            f"model.compat.bucket_factors=[S/{self.bucket_size}]"
        )
        return {
            "n_hashes": n_hashes,
            "n_buckets": n_buckets,
            "neighbours": NeighbourRule.chunk,
            "chunk_len": self.bucket_size,
            "compat": CompatConfig(bucket_factors=[n_buckets], chunk_wrap=True),
        }

    def _exact_attention(self) -> dict[str, Any]:
        """Shared query-key attention to all tokens: one bucket, and a window of max_seq_len."""
        return {"n_hashes": 1, "n_buckets": 1, "neighbours": NeighbourRule.window, "window": self.max_seq_len}

    def weights(self) -> dict[str, Tensor]:
        """Weights by our names. Raises CheckpointError."""
        weights = {**self._embedding(), **self._head()}
        for layer in range(self.config.n_layers):
            for name, tensor in self._layer(layer).items():
                if not torch.equal(weights.setdefault(name, tensor), tensor):
                    problem = f"weight_tie=true: layer {layer} has other weights than the first"
                    raise CheckpointError(f"{self._state.directory}: {problem}; must be false")
        weights |= self._weight_and_bias("stack.norm", "norm", self.config.dim)
        self._state.refuse_unread()
        shapes = parameter_shapes(lambda: ReformerLM(self.config, self.vocab_size))
        where = self._state.directory
        return {name: reshape_checked(weights[name], shape, name, where) for name, shape in shapes.items()}

    def _get(self, name: str, *shape: int) -> Tensor:
        return self._state.get(name, shape)

    def _weight_and_bias(self, ours: str, theirs: str, *shape: int) -> dict[str, Tensor]:
        sizes = {"weight": shape, "bias": shape[:1]}
        return {f"{ours}.{part}": self._get(f"{theirs}.{part}", *size) for part, size in sizes.items()}

    def _embedding(self) -> dict[str, Tensor]:
        """Tables of tokens and positions, and the projection to the model's width."""
        config, width = self.config, self.config.embedding_width
        weights = {"embedding.tokens.weight": self._get("token_emb.weight", self.vocab_size, width)}
        if self.position is Position.axial:
            for side, length in enumerate(self.axial_shape):
                old_name = f"pos_emb.weights_{side}"
                name = old_name if old_name in self._state else f"pos_emb.weights.{side}"
                weights[f"embedding.positions.tables.{side}"] = self._get(name, length, width)
        elif self.position is Position.learned:
            weights["embedding.positions.table"] = self._get("pos_emb.emb.weight", self.max_seq_len, width)
        if config.embedding_dim is not None:
            weights |= self._weight_and_bias("embedding.to_dim", "to_model_dim", config.dim, width)
        return weights

    def _head(self) -> dict[str, Tensor]:
        config, width = self.config, self.config.embedding_width
        if self.ties_embedding:
            # of their tied table, the head reads normalized rows and the embedding plain ones
            self._get("out.1.tensor", self.vocab_size, width)
            table = self._get("token_emb.weight", self.vocab_size, width)
            weights = {"head.weight": F.normalize(table, dim=-1), "head.bias": torch.zeros(self.vocab_size)}
        else:
            weights = self._weight_and_bias("head", "out.1", self.vocab_size, width)
        if config.embedding_dim is not None:
            weights |= self._weight_and_bias("head.to_table", "out.0", width, config.dim)
        return weights

    def _norm(self, ours: str, theirs: str, layer: int) -> dict[str, Tensor]:
        config = self.config
        if config.compat.norm_per_layer:
            ours = f"{ours}.{layer}"
        if config.norm is Norm.layer:
            return self._weight_and_bias(ours, f"{theirs}.norm", config.dim)
        name = f"{theirs}.g" if config.norm is Norm.rezero else f"{theirs}.norm.g"
        return {f"{ours}.weight": self._get(name, 1)}

    def _layer(self, layer: int) -> dict[str, Tensor]:
        config, theirs = self.config, f"reformer.layers.blocks.{layer}"
        dim, inner_dim, ff_dim = config.dim, config.n_heads * config.resolved_head_dim, config.resolved_ff_dim
        attention, feed_forward = f"{theirs}.f.net.fn", f"{theirs}.g.net.fn.fn"
        to_qk = self._get(f"{attention}.toqk.weight", inner_dim, dim)
        if config.position is Position.rotary:
            # reformer_pytorch rotates adjacent pairs of channels, and we rotate channels half a head apart
            to_qk = to_qk.view(config.n_heads, -1, 2, dim).transpose(1, 2).reshape(inner_dim, dim)
        value_dim = config.resolved_head_dim if config.one_value_head else inner_dim
        is_gated = config.activation is Activation.glu
        to_inner = self._weight_and_bias(
            "feed_forward.to_inner", f"{feed_forward}.w1", ff_dim * (1 + is_gated), dim
        )
        if is_gated:
            # the gate comes first in reformer_pytorch, and after the value here
            to_inner = {name: torch.cat(x.chunk(2)[::-1]) for name, x in to_inner.items()}
        weights = {
            **self._norm("attention_norm", f"{theirs}.f.net", layer),
            "attention.to_q.weight": to_qk,
            "attention.to_v.weight": self._get(f"{attention}.tov.weight", value_dim, dim),
            **self._weight_and_bias("attention.to_out", f"{attention}.to_out", dim, inner_dim),
            **self._norm("feed_forward_norm", f"{theirs}.g.net", layer),
            **to_inner,
            **self._weight_and_bias("feed_forward.to_out", f"{feed_forward}.w2", dim, ff_dim),
        }
        return {f"stack.blocks.{layer % config.n_blocks}.{name}": tensor for name, tensor in weights.items()}


def _norm(options: ForeignOptions) -> Norm:
    """ReZero replaces the norm there, also a scale norm."""
    is_scale: bool = options.take("use_scale_norm", False, kind=bool)
    is_rezero: bool = options.take("use_rezero", False, kind=bool)
    return Norm.rezero if is_rezero else Norm.scale if is_scale else Norm.layer
