"""Cases of bench_attention.py: implementations of attention, their sizes, and the reference of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from reformer_dist.ops.lsh import (
    AttentionOptions,
    WindowRule,
    bucket_attention,
    draw_rotations,
    hash_vectors,
)
from reformer_dist.ops.lsh.reference import reference_attention

PEERS = {
    "reformer_pytorch": "reformer_pytorch",
    "transformers": "transformers",
    "transformers_own": "transformers",
}
"""Other Reformers, and the packages that they need."""
OWN_KEYS = "own_keys"
OURS = {"ours": "auto", "ours_torch": "torch", OWN_KEYS: "auto"}
"""Our implementations, and their backends."""
CPU_ONLY = ("ours_torch",)
CUDA_ONLY = ("flash", "cudnn", "flex")
IMPLEMENTATIONS = (*OURS, *PEERS, "sdpa", *CUDA_ONLY)
CHECK_SEQ_LEN = 512
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}

Attend = Callable[[Tensor, Tensor], Tensor]  # (q, v), each [1, H, S, D] -> an output of as many elements


@dataclass(frozen=True)
class BenchCase:
    """One measurement."""

    impl: str
    seq_len: int
    n_hashes: int
    heads: int
    head_dim: int
    window: int
    n_buckets: int | None
    dtype: str
    device: str
    repeat: int
    threads: int

    @property
    def buckets(self) -> int:
        """Number of buckets; by default seq_len / window, rounded down to an even number."""
        return self.n_buckets or max(1, self.seq_len // self.window // 2 * 2)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, v (leaves) and the gradient of the output, [1, H, S, D].

        Drawn on the device: for long rows, drawing on the CPU takes longer than the measurement.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, self.heads, self.seq_len, self.head_dim)
        dtype = getattr(torch, self.dtype)
        q, v, d_out = (torch.randn(shape, generator=generator, device=self.device, dtype=dtype) for _ in range(3))
        return q.requires_grad_(), v.requires_grad_(), d_out

    def shortened(self) -> BenchCase:
        """The case to check: short enough for dense matrices, with the same mean bucket size."""
        seq_len = min(self.seq_len, max(CHECK_SEQ_LEN, 2 * self.window))
        n_buckets = self.n_buckets
        if n_buckets is not None and seq_len < self.seq_len:
            n_buckets = max(1, n_buckets * seq_len // self.seq_len // 2 * 2)
        return replace(self, seq_len=seq_len, n_buckets=n_buckets, repeat=1)


def run_once(attend: Attend, q: Tensor, v: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of q and v."""
    out = attend(q, v)
    dq, dv = torch.autograd.grad(out, (q, v), d_out.view(out.shape))
    return out, dq, dv


def check(row: BenchCase) -> bool:
    """Whether a `shortened` case is computed correctly; for peers, only whether the results are finite."""
    q, v, d_out = row.inputs()
    actual = run_once(IMPLEMENTATION[row.impl](row), q, v, d_out)
    if row.impl in PEERS:
        return all(x.numel() == q.numel() and x.isfinite().all() for x in actual)
    exact = attend_reference if row.impl in OURS else attend_dense
    q, v = (x.detach().float().requires_grad_() for x in (q, v))
    expected = run_once(lambda q, v: exact(row, q, v), q, v, d_out.float())
    pairs = zip(actual, expected, strict=True)
    return hashes_match(row, q) and all(is_close(row, x.detach().float(), y.detach()) for x, y in pairs)


def hashes_match(row: BenchCase, q: Tensor) -> bool:
    """Whether bucket ids equal PyTorch's, except for near ties within rounding error."""
    if row.impl not in OURS:
        return True
    plain = hash_buckets(row, q, backend="torch")
    return bool((hash_buckets(row, q) == plain).float().mean() > 0.999)


def is_close(row: BenchCase, actual: Tensor, expected: Tensor) -> bool:
    """Elementwise; for ours also in norm, since a missing key may be within bf16's elementwise tolerance."""
    tolerance, error = TOLERANCE[row.dtype], actual - expected
    is_elementwise_close = error.abs().max() <= tolerance * (1 + expected.abs().max())
    return bool(is_elementwise_close) and (
        row.impl not in OURS or bool(error.norm() <= tolerance * expected.norm())
    )


def our_options(row: BenchCase) -> AttentionOptions:
    own_keys, scale = row.impl == OWN_KEYS, row.head_dim**-0.5
    rule = WindowRule(row.window, causal=True, sees_self=own_keys)
    return AttentionOptions(rule, row.buckets, scale, backend=OURS[row.impl], own_keys=own_keys)


def own_keys(row: BenchCase, q: Tensor) -> Tensor | None:
    """Keys of their own, which are the queries of another head; None for shared ones."""
    return q.roll(1, dims=1) if row.impl == OWN_KEYS else None


def ours(row: BenchCase) -> Attend:
    options = our_options(row)

    def attend(q: Tensor, v: Tensor) -> Tensor:
        k = own_keys(row, q)
        query_ids = hash_buckets(row, q)
        if k is None:
            return bucket_attention(q, None, v, query_ids, options)
        return bucket_attention(q, k, v, hash_buckets(row, k), options, query_ids=query_ids)

    return attend


def hash_buckets(row: BenchCase, q: Tensor, backend: str | None = None) -> Tensor:
    """Bucket ids of q in the dtype of the case, also for the reference: near ties differ in float32."""
    rotations = draw_rotations(row.heads, row.head_dim, row.n_hashes, row.buckets, "rotation", seed=0)
    vectors = q.detach().to(getattr(torch, row.dtype))
    chosen = backend or OURS[row.impl]
    return hash_vectors(vectors, rotations, row.buckets, "rotation", backend=chosen)


def mean_visible_keys(row: BenchCase, ids: Tensor) -> float:
    """Mean number of keys per token and round: earlier tokens in the bucket, at most window - 1."""
    sizes = torch.stack([torch.bincount(x.int(), minlength=row.buckets) for x in ids.flatten(0, 2)])
    full = sizes.clamp_max(row.window)
    n_pairs = full * (full - 1) // 2 + (sizes - full) * (row.window - 1)
    return float(n_pairs.sum() / ids.numel())


def attend_reference(row: BenchCase, q: Tensor, v: Tensor) -> Tensor:
    query_ids, k, scale = hash_buckets(row, q), own_keys(row, q), row.head_dim**-0.5
    rule = WindowRule(row.window, causal=True, sees_self=k is not None)
    if k is None:
        return reference_attention(q, F.normalize(q, dim=-1), v, query_ids, rule, scale=scale)
    separate = {"query_ids": query_ids, "attends_alone": False}
    return reference_attention(q, k, v, hash_buckets(row, k), rule, scale=scale, **separate)


def reformer_pytorch(row: BenchCase) -> Attend:
    from reformer_pytorch.reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=row.window, n_hashes=row.n_hashes, causal=True)
    return lambda q, v: layer(q.flatten(0, 1), v.flatten(0, 1))[0]


def transformers(row: BenchCase) -> Attend:
    return transformers_layer(row, row.buckets)


def transformers_own(row: BenchCase) -> Attend:
    return transformers_layer(row, None)


def transformers_layer(row: BenchCase, n_buckets: int | None) -> Attend:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = ReformerConfig(
        attention_head_size=row.head_dim,
        num_attention_heads=row.heads,
        lsh_attn_chunk_length=row.window,
        lsh_attention_probs_dropout_prob=0.0,
        num_buckets=n_buckets,
        num_hashes=row.n_hashes,
        max_position_embeddings=row.seq_len,
        is_decoder=True,
    )
    layer = LSHSelfAttention(config).to(row.device)
    hidden = torch.empty(1, row.seq_len, 0, device=row.device)  # only its shape is used
    del layer.query_key, layer.value

    def attend(q: Tensor, v: Tensor) -> Tensor:
        layer.query_key, layer.value = (lambda _, x=x: x.transpose(1, 2).flatten(2) for x in (q, v))
        return layer(hidden).hidden_states

    return attend


def sdpa(row: BenchCase) -> Attend:
    return lambda q, v: F.scaled_dot_product_attention(q, q, v, is_causal=True)


def with_kernel(backend: SDPBackend) -> Callable[[BenchCase], Attend]:
    def build(row: BenchCase) -> Attend:
        def attend(q: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, q, v, is_causal=True)

        return attend

    return build


def flex(row: BenchCase) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    reach = flex_reach(row)

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < reach)

    mask = create_block_mask(in_window, None, None, row.seq_len, row.seq_len, device=row.device)
    # static shapes: after the check's length, it would otherwise compile slower code for dynamic ones
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, v: compiled(q, q, v, block_mask=mask)


def flex_reach(row: BenchCase) -> int:
    """Mean number of keys that a token of ours attends to in all rounds."""
    q, _, _ = row.inputs()
    return round(row.n_hashes * mean_visible_keys(row, hash_buckets(row, q, backend="auto")))


def attend_dense(row: BenchCase, q: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(row.seq_len, device=q.device)
    distance = position[:, None] - position[None, :]
    reach = flex_reach(row) if row.impl == "flex" else row.seq_len
    scores = q.shape[-1] ** -0.5 * q @ q.transpose(-1, -2)
    return scores.masked_fill((distance < 0) | (distance >= reach), -torch.inf).softmax(-1) @ v


IMPLEMENTATION: dict[str, Callable[[BenchCase], Attend]] = {
    **dict.fromkeys(OURS, ours),
    "reformer_pytorch": reformer_pytorch,
    "transformers": transformers,
    "transformers_own": transformers_own,
    "sdpa": sdpa,
    "flash": with_kernel(SDPBackend.FLASH_ATTENTION),
    "cudnn": with_kernel(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
}
EXACT = ("sdpa", "flash", "cudnn")
