"""Import of language models of Trax: the weights of a `ReformerLM` and its gin configuration.

The weights are in model.weights.npy.gz (concatenated arrays) or, with older versions and `save_to_file`, in the
pickle model.pkl.gz, which is read without executing it. A config.json next to them is a JSON object with the
arguments of ReformerLM and of its attention layers, such as "LSHSelfAttention.chunk_len".
Written against Trax's source; docs/interop.md lists what is equal.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reformer_dist.config import (
    Activation,
    AttentionKind,
    CompatConfig,
    ModelConfig,
    NeighbourRule,
    Position,
    StreamMerge,
)
from reformer_dist.errors import CheckpointError
from reformer_dist.interop.foreign import CONFIG_FILE, ForeignModel, ForeignOptions, HeadKind, reshape_checked
from reformer_dist.interop.pickles import read_pickle

PICKLE, ARRAYS = "model.pkl.gz", "model.weights.npy.gz"
EPS = 1e-6
ACTIVATIONS = {"Relu": Activation.relu, "Gelu": Activation.gelu, "FastGelu": Activation.gelu_tanh}
LAYERS = ("SelfAttention", "LSHSelfAttention")
WITHOUT_COUNTERPART: dict[str, tuple[Any, str]] = {
    "ff_use_sru": (0, "there are no recurrent units here"),
    "ff_sparsity": (0, "feed-forward layers here are dense"),
    "loss_sparsity": (0, "the head here is dense"),
    "SelfAttention.share_qk": (False, "local and exact layers here have separate keys"),
    "SelfAttention.bias": (False, "projections here have no bias"),
    "LSHSelfAttention.bias": (False, "projections here have no bias"),
}
# options that change training or the implementation only
WITHOUT_EFFECT = (
    *("mode", "attention_chunk_size", "pos_start_from_zero_prob", "pos_max_offset_to_add"),
    *("loss_sparsity_type", "loss_d_lowrank", "loss_sparsity_prob"),
)
LAYER_OPTIONS = (
    *("masked", "predict_mem_len", "predict_drop_len", "n_parallel_heads", "use_python_loop"),
    *("attention_dropout", "output_dropout", "use_reference_code", "max_length_for_buckets"),
)
# values of pos_type without a counterpart; any other name makes positions axial, and none the table
OTHER_POSITIONS = ("sin-cos", "fixed-base", "infinite", "infinite-affine", "time-bin", "no")
SIZE = (int, type(None))


def is_trax(directory: Path) -> bool:
    return (directory / PICKLE).is_file() or (directory / ARRAYS).is_file()


def read(directory: Path) -> ForeignModel:
    """Reads a directory with weights and config.json. Raises CheckpointError."""
    options = ForeignOptions.read(directory / CONFIG_FILE)
    notes = ["Trax's ShiftRight prepends token 0 to every input; prepend it yourself here"]
    vocab_size: int = options.require("vocab_size", int)
    stored = cache(lambda: _read_arrays(directory))
    config = model_config(options, notes, lambda: stored()[1])
    weights = dict(_FlatWeights(*stored()).named(config, vocab_size))
    return ForeignModel("Trax", HeadKind.language_model, config, vocab_size, weights, notes)


def model_config(
    options: ForeignOptions, notes: list[str], read_arrays: Callable[[], list[NDArray[Any]]]
) -> ModelConfig:
    """Converts options of Trax to a ModelConfig. Raises CheckpointError. Appends to notes.

    read_arrays: returns the weights, which show the kind of positions where the options leave it open.
    """
    options.refuse_other_values(WITHOUT_COUNTERPART)
    for name in (*WITHOUT_EFFECT, *(f"{layer}.{name}" for layer in LAYERS for name in LAYER_OPTIONS)):
        options.take(name)
    head_dim: int = options.take("d_attention_key", 64, kind=int)
    if options.take("d_attention_value", 64, kind=int) != head_dim:
        reason = f"must be d_attention_key={head_dim}: queries and values have one width"
        options.refuse("d_attention_value", reason)
    max_len: int = options.take("max_len", 2048, kind=int)
    local_chunk: int | None = options.take("SelfAttention.chunk_len", None, kind=SIZE)
    chunk_len: int = options.take("LSHSelfAttention.chunk_len", 128, kind=int)
    factors = _bucket_factors(options, chunk_len, max_len, notes)
    dim: int = options.take("d_model", 512, kind=int)
    dropout = float(options.take("dropout", 0.1, kind=(int, float)))
    config = ModelConfig(
        dim=dim,
        ff_dim=options.take("d_ff", 2048, kind=int),
        n_layers=options.take("n_layers", 6, kind=int),
        n_heads=options.take("n_heads", 8, kind=int),
        head_dim=head_dim,
        layers=_layers(options, local_chunk),
        n_hashes=options.take("LSHSelfAttention.n_hashes", 1, kind=int),
        n_buckets=math.prod(factors),
        neighbours=NeighbourRule.chunk,
        chunk_len=chunk_len,
        n_chunks_before=options.take("LSHSelfAttention.n_chunks_before", 1, kind=int),
        n_chunks_after=options.take("LSHSelfAttention.n_chunks_after", 0, kind=int),
        ff_chunk=options.take("ff_chunk_size", 0, kind=int),
        activation=options.take_choice("ff_activation", ACTIVATIONS, "FastGelu"),
        norm_eps=EPS,
        dropout=dropout,
        ff_dropout=dropout,
        attention_dropout=dropout,
        compat=CompatConfig(
            bucket_factors=factors,
            chunk_wrap=True,
            local_chunk_len=local_chunk or 0,
            local_chunks_before=options.take("SelfAttention.n_chunks_before", 0, kind=int),
            local_chunks_after=options.take("SelfAttention.n_chunks_after", 0, kind=int),
            merge_streams=StreamMerge.concat,
        ),
        **_positions(options, max_len, dim, notes, read_arrays),
    )
    options.refuse_unknown("ReformerLM of Trax")
    return config


def _layers(options: ForeignOptions, local_chunk: int | None) -> list[AttentionKind]:
    kinds = {
        "SelfAttention": AttentionKind.exact if local_chunk is None else AttentionKind.local,
        "LSHSelfAttention": AttentionKind.lsh,
    }
    types = options.take("attention_type", "SelfAttention", kind=(str, list))
    names = [str(name).rpartition(".")[2] for name in ([types] if isinstance(types, str) else types)]
    if not names or not set(names) <= set(kinds):
        options.refuse("attention_type", f"must name {' and '.join(kinds)}")
    return [kinds[name] for name in names]


def _bucket_factors(options: ForeignOptions, chunk_len: int, max_len: int, notes: list[str]) -> list[int]:
    factors = options.take_factors("LSHSelfAttention.n_buckets")
    if factors is not None:
        return factors
    n_buckets = 2 * max(1, max_len // chunk_len)
    notes.append(f"Trax derives n_buckets from the length; set for max_len={max_len} tokens: {n_buckets}")
    if n_buckets <= 128:
        return [n_buckets]
    first = 2 ** math.ceil(math.log2(math.sqrt(n_buckets)))
    return [first, 2 * (n_buckets // (2 * first))]


def _positions(
    options: ForeignOptions,
    max_len: int,
    dim: int,
    notes: list[str],
    read_arrays: Callable[[], list[NDArray[Any]]],
) -> dict[str, Any]:
    """Axial positions with a pos_type and, in older versions, with a pos_axial_shape; else a table."""
    pos_type, shape = options.take("pos_type", None), options.take("pos_axial_shape", None)
    dims: list[int] | None = options.take("pos_d_axial_embs", None)
    if pos_type in OTHER_POSITIONS:
        options.refuse("pos_type", "must be axial, or null for the table of PositionalEncoding")
    table = {"position": Position.learned, "max_seq_len": max_len}
    if not pos_type and not shape:
        return table
    if not pos_type and _sides(read_arrays()[1:2]) == [[max_len, dim]]:
        notes.append(
            "pos_axial_shape: without pos_type, this version of Trax trained a table of positions instead"
        )
        return table
    if not shape:
        options.refuse("pos_axial_shape", f"must be given with pos_type={pos_type}")
    axial_dims = None if dims is None else list(dims)
    return {"position": Position.axial, "axial_shape": list(shape), "axial_dims": axial_dims}


def _sides(arrays: list[NDArray[Any]]) -> list[list[int]]:
    """Shapes without dimensions of size 1, which versions of Trax add and leave out."""
    return [[side for side in array.shape if side != 1] for array in arrays]


def _read_arrays(directory: Path) -> tuple[Path, list[NDArray[Any]]]:
    """The weights in file order, and their path. Raises CheckpointError."""
    path = directory / ARRAYS
    if path.is_file():
        return path, list(_concatenated_arrays(path))
    path = directory / PICKLE
    if not path.is_file():
        raise CheckpointError(f"{directory}: has neither {ARRAYS} nor {PICKLE}")
    saved = read_pickle(_decompress(path), str(path))
    for key in ("flat_weights", "weights"):
        if isinstance(saved, dict) and isinstance(saved.get(key), list | tuple):
            return path, list(_leaves(saved[key], str(path)))
    raise CheckpointError(f"{path}: contains no weights; they should be in {ARRAYS} next to it")


def _decompress(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise CheckpointError(f"{path}: can't be decompressed: {error}") from error


def _concatenated_arrays(path: Path) -> Iterator[NDArray[Any]]:
    data = _decompress(path)
    file = io.BytesIO(data)
    try:
        while file.tell() < len(data):
            yield _as_float32(np.load(file, allow_pickle=False), str(path))
    except (ValueError, OSError, EOFError) as error:
        raise CheckpointError(f"{path}: no valid array after byte {file.tell()}: {error}") from error


def _leaves(tree: Any, where: str) -> Iterator[NDArray[Any]]:
    """Arrays of nested lists and tuples, in order."""
    if isinstance(tree, list | tuple):
        for branch in tree:
            yield from _leaves(branch, where)
    elif tree is not None:
        yield _as_float32(tree, where)


def _as_float32(value: Any, where: str) -> NDArray[Any]:
    if not isinstance(value, np.ndarray):
        raise CheckpointError(f"{where}: has {type(value).__name__} among its weights; all must be arrays")
    if value.dtype == np.uint16:  # the bits of bfloat16
        return (value.astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32)


class _FlatWeights:
    """Weights in the order of the layers of a ReformerLM, read sequentially."""

    def __init__(self, where: Path, arrays: list[NDArray[Any]]) -> None:
        self._where, self._arrays, self._next = where, arrays, 0

    def take(self, label: str, *shape: int) -> Tensor:
        if self._next == len(self._arrays):
            raise CheckpointError(f"{self._where}: ends after {self._next} arrays; {label} should follow")
        array = torch.from_numpy(np.ascontiguousarray(self._arrays[self._next]))
        self._next += 1
        return reshape_checked(array, shape, f"array {self._next} ({label})", self._where)

    def named(self, config: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
        """(our name, weight) of every parameter. Raises CheckpointError if the arrays do not match the config."""
        yield "embedding.tokens.weight", self.take("embedding", vocab_size, config.dim)
        if config.position is Position.axial:
            for side, shape in enumerate(zip(config.axial_shape, config.resolved_axial_dims, strict=True)):
                yield f"embedding.positions.tables.{side}", self.take(f"positions, side {side}", *shape)
        else:
            yield "embedding.positions.table", self.take("positions", config.max_seq_len, config.dim)
        for layer, kind in enumerate(config.layer_kinds()):
            for name, tensor in self._layer(config, kind, f"layer {layer}"):
                yield f"stack.blocks.{layer}.{name}", tensor
        yield from self._norm("stack.norm", "the last norm", config.output_dim)
        yield from self._dense("head", "the head", config.output_dim, vocab_size)
        if self._next < len(self._arrays):
            n_more = len(self._arrays) - self._next
            raise CheckpointError(f"{self._where}: has {n_more} more arrays than the model its options describe")

    def _layer(self, config: ModelConfig, kind: AttentionKind, label: str) -> Iterator[tuple[str, Tensor]]:
        dim, n_heads, head_dim = config.dim, config.n_heads, config.resolved_head_dim
        yield from self._norm("attention_norm", f"{label}, norm of attention", dim)
        for name in ("q", "v") if kind is AttentionKind.lsh else ("q", "k", "v"):
            by_head = self.take(f"{label}, w_{name}", n_heads, dim, head_dim)
            yield f"attention.to_{name}.weight", by_head.transpose(1, 2).reshape(-1, dim).contiguous()
        to_out = self.take(f"{label}, w_o", n_heads, head_dim, dim)
        yield "attention.to_out.weight", to_out.reshape(-1, dim).T.contiguous()
        yield from self._norm("feed_forward_norm", f"{label}, norm of feed-forward", dim)
        yield from self._dense("feed_forward.to_inner", f"{label}, feed-forward", dim, config.resolved_ff_dim)
        yield from self._dense("feed_forward.to_out", f"{label}, feed-forward", config.resolved_ff_dim, dim)

    def _norm(self, ours: str, label: str, dim: int) -> Iterator[tuple[str, Tensor]]:
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", self.take(label, dim)

    def _dense(self, ours: str, label: str, n_in: int, n_out: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{ours}.weight", self.take(label, n_in, n_out).T.contiguous()
        yield f"{ours}.bias", self.take(f"{label}, bias", n_out)
