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

from reformer_dist.config import Activation, AttentionKind, CompatConfig, ModelConfig, NeighbourRule, Position
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
from reformer_dist.models.embedding import SinusoidalPositions

SYSTEM = "reformer_pytorch"
PICKLE_HINT = """if you trust it, convert it with these lines:
  import torch, safetensors.torch as st
  state = torch.load("FILE", weights_only=True)
  st.save_file({name: x.clone() for name, x in state.items()}, "model.safetensors")"""
FLOAT = (int, float)
# (only supported value, reason)
WITHOUT_COUNTERPART: dict[str, tuple[Any, str]] = {
    "n_local_attn_heads": (0, "heads of a layer are of one kind here; local attention has its own layers"),
    "num_mem_kv": (0, "every key here belongs to a token; there are no memory keys"),
    "pkm_layers": ([], "there are no product-key memories here"),
    "use_scale_norm": (False, "converted layers have a layer norm; new models support model.norm=scale"),
    "use_rezero": (False, "converted layers have a layer norm; new models support model.norm=rezero"),
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
    for name, note in (
        ("layer_dropout", "not converted; set model.layer_drop for training"),
        ("full_attn_thres", "inputs up to that length use exact attention there, and LSH attention here"),
    ):
        if options.take(name, 0):
            notes.append(f"{name}: {note}")
    tensors = ForeignTensors(directory, PICKLE_HINT)
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
        self.emb_dim: int = options.take("emb_dim", None) or options.require("dim", int)
        self.one_value_head = bool(options.take("one_value_head", False))
        self.ties_embedding = bool(options.take("weight_tie_embedding", False))
        self.bucket_size: int = options.take("bucket_size", 64, kind=int)
        kinds = {"axial": Position.axial, "absolute": Position.learned, "fixed": Position.sinusoidal}
        chosen = [kind for name, kind in kinds.items() if options.take(f"{name}_position_emb", False)]
        self.position = chosen[0] if chosen else Position.rotary
        self.axial_shape = options.take("axial_position_shape", None) or [
            math.ceil(self.max_seq_len / self.bucket_size),
            self.bucket_size,
        ]
        if options.take("weight_tie", False):
            notes.append("weight_tie: layers that share parameters there have separate copies here")
        self.config = self._config(options, notes)

    def _config(self, options: ForeignOptions, notes: list[str]) -> ModelConfig:
        dim: int = options.require("dim", int)
        head_dim: int = options.take("dim_head", None, kind=(int, type(None))) or 64
        use_full = bool(options.take("use_full_attn", False))
        if use_full and self.position is Position.rotary:
            reason = "its exact attention ignores rotary positions; needs another kind of position"
            options.refuse("use_full_attn", reason)
        n_hashes: int = options.take("n_hashes", 4, kind=int)
        attention = self._exact_attention() if use_full else self._chunked_attention(n_hashes, notes)
        compat = attention.pop("compat", CompatConfig())
        is_table = self.position is Position.sinusoidal and self.emb_dim != dim
        return ModelConfig(
            dim=dim,
            n_layers=options.require("depth", int),
            n_heads=options.take("heads", 8, kind=int),
            head_dim=head_dim,
            layers=[AttentionKind.lsh],
            causal=options.take("causal", False, kind=bool),
            qk_scale=head_dim**-0.5,
            ff_mult=options.take("ff_mult", 4, kind=int),
            activation=Activation.glu if options.take("ff_glu", False) else Activation.gelu,
            position=Position.learned if is_table else self.position,
            axial_shape=list(self.axial_shape),
            max_seq_len=self.max_seq_len,
            attention_dropout=float(options.take("lsh_dropout", 0.0, kind=FLOAT)),
            ff_dropout=float(options.take("ff_dropout", 0.0, kind=FLOAT)),
            compat=replace(compat, attention_bias=True, axial_sum=self.position is Position.axial),
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
            weights.update(self._layer(layer))
        dim = self.config.dim
        weights["stack.norm.weight"] = self._get("norm.weight", dim)
        weights["stack.norm.bias"] = self._get("norm.bias", dim)
        self._state.refuse_unread()
        shapes = parameter_shapes(lambda: ReformerLM(self.config, self.vocab_size))
        where = self._state.directory
        return {name: reshape_checked(weights[name], shape, name, where) for name, shape in shapes.items()}

    def _get(self, name: str, *shape: int) -> Tensor:
        return self._state.get(name, shape)

    def _embedding(self) -> dict[str, Tensor]:
        """Token and position tables, with emb_dim multiplied by the projection to dim."""
        config, width = self.config, self.emb_dim
        table = self._get("token_emb.weight", self.vocab_size, width)
        positions: dict[str, Tensor] = {}
        if self.position is Position.axial:
            for side, length in enumerate(self.axial_shape):
                old_name = f"pos_emb.weights_{side}"
                name = old_name if old_name in self._state else f"pos_emb.weights.{side}"
                positions[f"embedding.positions.tables.{side}"] = self._get(name, length, width)
        elif self.position is Position.learned:
            positions["embedding.positions.table"] = self._get("pos_emb.emb.weight", self.max_seq_len, width)
        elif self.position is Position.sinusoidal and width != config.dim:
            positions["embedding.positions.table"] = SinusoidalPositions(width)(torch.arange(self.max_seq_len))
        if width == config.dim:
            return {"embedding.tokens.weight": table, **positions}
        projection = self._get("to_model_dim.weight", config.dim, width).T
        bias = self._get("to_model_dim.bias", config.dim)
        positions = {name: x @ projection for name, x in positions.items()}
        return {"embedding.tokens.weight": table @ projection + bias, **positions}

    def _head(self) -> dict[str, Tensor]:
        width, dim = self.emb_dim, self.config.dim
        if self.ties_embedding:
            self._get("out.1.tensor", self.vocab_size, width)
            weight = F.normalize(self._get("token_emb.weight", self.vocab_size, width), dim=-1)
            bias = torch.zeros(self.vocab_size)
        else:
            weight = self._get("out.1.weight", self.vocab_size, width)
            bias = self._get("out.1.bias", self.vocab_size)
        if width != dim:
            bias = bias + weight @ self._get("out.0.bias", width)
            weight = weight @ self._get("out.0.weight", width, dim)
        return {"head.weight": weight, "head.bias": bias}

    def _layer(self, layer: int) -> dict[str, Tensor]:
        config, block = self.config, f"reformer.layers.blocks.{layer}"
        dim, attention_dim, ff_dim = config.dim, config.n_heads * config.resolved_head_dim, config.resolved_ff_dim
        attention, feed_forward = f"{block}.f.net", f"{block}.g.net"
        to_qk = self._get(f"{attention}.fn.toqk.weight", attention_dim, dim)
        if config.position is Position.rotary:
            # reformer_pytorch rotates adjacent pairs of channels, and we rotate channels half a head apart
            to_qk = to_qk.view(config.n_heads, -1, 2, dim).transpose(1, 2).reshape(attention_dim, dim)
        n_values = 1 if self.one_value_head else config.n_heads
        to_v = self._get(f"{attention}.fn.tov.weight", n_values * config.resolved_head_dim, dim)
        inner_dim = 2 * ff_dim if config.activation is Activation.glu else ff_dim
        to_inner = [
            self._get(f"{feed_forward}.fn.fn.w1.weight", inner_dim, dim),
            self._get(f"{feed_forward}.fn.fn.w1.bias", inner_dim),
        ]
        if config.activation is Activation.glu:
            # the gate comes first in reformer_pytorch, and after the value here
            to_inner = [torch.cat(x.chunk(2)[::-1]) for x in to_inner]
        weights = {
            "attention_norm.weight": self._get(f"{attention}.norm.weight", dim),
            "attention_norm.bias": self._get(f"{attention}.norm.bias", dim),
            "attention.to_q.weight": to_qk,
            "attention.to_v.weight": to_v.repeat(config.n_heads // n_values, 1),
            "attention.to_out.weight": self._get(f"{attention}.fn.to_out.weight", dim, attention_dim),
            "attention.to_out.bias": self._get(f"{attention}.fn.to_out.bias", dim),
            "feed_forward_norm.weight": self._get(f"{feed_forward}.norm.weight", dim),
            "feed_forward_norm.bias": self._get(f"{feed_forward}.norm.bias", dim),
            "feed_forward.to_inner.weight": to_inner[0],
            "feed_forward.to_inner.bias": to_inner[1],
            "feed_forward.to_out.weight": self._get(f"{feed_forward}.fn.fn.w2.weight", dim, ff_dim),
            "feed_forward.to_out.bias": self._get(f"{feed_forward}.fn.fn.w2.bias", dim),
        }
        return {f"stack.blocks.{layer}.{name}": tensor for name, tensor in weights.items()}
