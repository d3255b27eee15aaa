"""The backends of LSH and local attention: where each can run, and the selection of one.

reference   dense matrices, slow: the definition of the attention (`reference.py`)
torch       tiles in plain PyTorch, on any device (`torch_tiles/`)
native      C for CPUs, window rule (`native/`); compiled by the local compiler on first use
triton      kernels for NVIDIA GPUs (`triton_kernels/`); Triton is imported only if they are selected

All agree to rounding on whole sequences and, except for the reference, on partitions of them (`attention.Shard`).
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from reformer_dist.ops.checks import check_range
from reformer_dist.ops.lsh.attention import Backend, LocalExchange, WorkspaceShape, attend
from reformer_dist.ops.lsh.hashing import check_factors, check_rotations, count_columns
from reformer_dist.ops.lsh.native.attention import NativeBackend
from reformer_dist.ops.lsh.native.library import unavailable_reason
from reformer_dist.ops.lsh.neighbour_rules import ChunkRule
from reformer_dist.ops.lsh.next_values import document_starts, next_values, zero_padding, zero_starts
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.reference import reference_attention
from reformer_dist.ops.lsh.shared_keys import shared_keys
from reformer_dist.ops.lsh.torch_tiles.attention import TorchBackend
from reformer_dist.ops.profiling import part

NAMES = ("reference", "torch", "native", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = {"native": 256, "triton": 128}
OLDEST_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies


def unsupported_reason(
    name: str, device: torch.device, head_dim: int, dtype: torch.dtype = torch.float32, *, chunks: bool = False
) -> str | None:
    """The reason why a backend can't run; None if it can. chunks: under the chunk rule."""
    if name not in ("auto", *NAMES):
        return f"must be auto, {', '.join(NAMES[:-1])} or {NAMES[-1]}"
    if name not in MAX_HEAD_DIM:
        return None
    if name == "native" and device.type != "cpu":
        return f"runs on the CPU, not on {device.type}; use auto, triton or torch here"
    if name == "native" and chunks:
        return "supports the window rule only; use torch for chunks"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "needs the package triton (pip install triton); torch needs no other package"
    if not _fits(name, head_dim):
        most = MAX_HEAD_DIM[name]
        return f"needs a head_dim that is a multiple of 16 up to {most}, not {head_dim}; use torch for any other"
    if dtype not in DTYPES:
        return f"supports float32, bfloat16 and float16, not {dtype}; use torch here"
    return unavailable_reason() if name == "native" else _missing_gpu(device)


def _fits(name: str, head_dim: int) -> bool:
    return head_dim % 16 == 0 and 16 <= head_dim <= MAX_HEAD_DIM[name]


def _missing_gpu(device: torch.device) -> str | None:
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "needs a GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, very slowly); use auto or torch here"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"needs a GPU of compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}; use torch here"
    return None


def choose(name: str, device: torch.device, head_dim: int, dtype: torch.dtype, *, chunks: bool = False) -> str:
    """The name of the backend to run. Raises ValueError if `name` can't."""
    fast = {"cuda": "triton", "cpu": "native"}.get(device.type, "torch")
    tried = fast if name == "auto" else name
    reason = unsupported_reason(tried, device, head_dim, dtype, chunks=chunks)
    if name == "auto":
        return fast if reason is None else "torch"
    if reason is not None:
        raise ValueError(f"backend={name}: {reason}")
    return name


def choose_for_planning(name: str, device_type: str, head_dim: int, *, chunks: bool) -> str:
    """The backend to assume in a plan for cpu or cuda. Needs neither the GPU nor Triton.

    Unlike `choose`, takes `reference` and the backends of the other device for `torch`.
    """
    fast = {"cuda": "triton", "cpu": "native"}[device_type]
    if name not in ("auto", fast):
        return "torch"
    if fast == "triton":
        return fast if _fits(fast, head_dim) else "torch"
    return choose("auto", torch.device("cpu"), head_dim, torch.float32, chunks=chunks)


def workspace_bytes(name: str, shape: WorkspaceShape) -> float:
    """`Backend.workspace_bytes` of a backend by name, without importing Triton."""
    if name == "triton":
        from reformer_dist.ops.lsh.triton_kernels import tuning

        return tuning.workspace_bytes(shape)
    return _load(name).workspace_bytes(shape)


def backend_for(options: AttentionOptions, v: Tensor, *, partitioned: bool = False) -> type[Backend]:
    """The backend for v [B, H, S, D] and these options. Raises ValueError if it can't run.

    partitioned: attention runs on one partition of the sorted order. `torch` then replaces `reference`, and under
    the chunk rule it replaces every backend.
    """
    chunks = isinstance(options.rule, ChunkRule)
    name = choose(options.backend, v.device, v.shape[3], v.dtype, chunks=chunks)
    return _load("torch" if partitioned and (chunks or name == "reference") else name)


def _load(name: str) -> type[Backend]:
    if name == "triton":
        from reformer_dist.ops.lsh.triton_kernels.attention import TritonBackend

        return TritonBackend
    return NativeBackend if name == "native" else TorchBackend


def bucket_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    bucket_ids: Tensor,
    options: AttentionOptions,
    key_padding_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
) -> Tensor:
    """Softmax over the union of the keys that each query attends to in its rounds (paper, eq. 2 to 4).

    q, k, v [B, H, S, D] -> [B, H, S, D] in v's dtype; k is None for shared query-key attention, whose keys are
    q / |q|. bucket_ids [B, H, R, S] integers below options.n_buckets; key_padding_mask [B, S], True for real
    tokens. query_ids: bucket ids of the queries, only with options.own_keys; bucket_ids are then of the keys. A
    query that met no key attends to itself, or gets 0 (`AttentionOptions.attends_alone`). Raises ValueError if
    options.backend can't run, and for tensors of other shapes, dtypes, devices or values.
    """
    exchange = LocalExchange(bucket_ids, options, key_padding_mask, query_ids)
    check_range("bucket_ids", bucket_ids, options.n_buckets, limit="n_buckets")
    if query_ids is not None:
        check_range("query_ids", query_ids, options.n_buckets, limit="n_buckets")
    if options.next_value_heads:
        exchange.check(q, k, v)
        documents, n_heads = options.document_ids, options.next_value_heads
        v = zero_starts(v, n_heads, None if documents is None else document_starts(documents))
        v = next_values(zero_padding(v, key_padding_mask), n_heads)
    return attend_locally(q, k, v, exchange)


def attend_locally(q: Tensor, k: Tensor | None, v: Tensor, exchange: LocalExchange) -> Tensor:
    """Like `bucket_attention`, for an existing exchange and a v already shifted by `next_values`."""
    exchange.check(q, k, v)
    options = exchange.options
    if options.own_keys and k is None:
        raise ValueError("k=None: must be given with own_keys=True")
    if options.backend != "reference":
        return attend(q, k, v, exchange, backend_for(options, v))
    with part("attend"):
        return reference_attention(
            q,
            shared_keys(q) if k is None else k,
            v,
            exchange.bucket_ids,
            options.rule,
            scale=options.scale,
            key_padding_mask=exchange.key_padding_mask,
            count_pairs_once=options.count_pairs_once,
            dropout=options.dropout,
            dropout_seed=options.dropout_seed,
            head_indices=options.head_indices(q.shape[0], q.shape[1], q.device),
            query_ids=exchange.query_ids,
            attends_alone=options.attends_alone,
            document_ids=options.document_ids,
        )


def hash_vectors(
    vectors: Tensor,
    rotations: Tensor,
    n_buckets: int,
    scheme: str,
    *,
    factors: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bucket ids [B, H, R, S] of vectors [B, H, S, D] under rotations [H, R, D, columns].

    The hash is defined in `hashing` and computed by the backend. rotations: from `draw_rotations` or
    `seeded_rotations`, with the same n_buckets, scheme and factors. Not differentiable. Raises ValueError.
    """
    factors = check_factors(n_buckets, scheme, factors)
    check_rotations(vectors, rotations, count_columns(factors, scheme))
    name = choose(backend, vectors.device, vectors.shape[3], vectors.dtype)
    return _load(name).hash(vectors, rotations, n_buckets, scheme, factors)
