"""What bench_attention.py times: implementations of attention, rows that name them, what each is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
"""Rows of other Reformers, and the packages that they need."""
OURS = {"ours": "auto", "ours_torch": "torch"}
"""Our rows, and the implementation that attends."""
CPU_ONLY = ("ours_torch",)
CUDA_ONLY = ("flash", "cudnn", "flex")
IMPLEMENTATIONS = (*OURS, *PEERS, "sdpa", *CUDA_ONLY)
CHECK_SEQ_LEN = 512
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}

Attend = Callable[[Tensor, Tensor], Tensor]  # (q, v), each [1, H, S, D] -> an output of as many elements


@dataclass(frozen=True)
class Row:
    """What one process measures."""

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
        """As many as make the mean bucket one window, rounded down to an even number."""
        return self.n_buckets or max(1, self.seq_len // self.window // 2 * 2)

    def inputs(self, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, v (leaves) and the gradient of the output, [1, H, S, D].

        Drawn where they are needed: a processor takes longer over those of a long row than a card over the row.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, self.heads, seq_len, self.head_dim)
        dtype = getattr(torch, self.dtype)
        q, v, d_out = (
            torch.randn(shape, generator=generator, device=self.device, dtype=dtype) for _ in range(3)
        )
        return q.requires_grad_(), v.requires_grad_(), d_out


def run_once(attend: Attend, q: Tensor, v: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of q and v."""
    out = attend(q, v)
    dq, dv = torch.autograd.grad(out, (q, v), d_out.view(out.shape))
    return out, dq, dv


def check(row: Row) -> bool:
    """Is what this implementation computes right, as far as that can be said? At a small length."""
    seq_len = min(row.seq_len, max(CHECK_SEQ_LEN, 2 * row.window))
    attend = IMPLEMENTATION[row.impl](row, seq_len)
    q, v, d_out = row.inputs(seq_len)
    found = run_once(attend, q, v, d_out)
    if row.impl in (*PEERS, "flex"):
        return all(x.numel() == q.numel() and x.isfinite().all() for x in found)
    q, v = (x.detach().float().requires_grad_() for x in (q, v))
    exact = attend_by_oracle(row, q, v) if row.impl in OURS else attend_densely(q, v)
    grads = torch.autograd.grad(exact, (q, v), d_out.float())
    tolerance = TOLERANCE[row.dtype]
    pairs = zip(found, (exact, *grads), strict=True)
    return all((x.float() - y).abs().max() <= tolerance * (1 + y.abs().max()) for x, y in pairs)


def our_options(row: Row) -> AttentionOptions:
    rule = WindowRule(row.window, causal=True)
    return AttentionOptions(rule, row.buckets, scale=row.head_dim**-0.5, implementation=OURS[row.impl])


def ours(row: Row, seq_len: int) -> Attend:
    options = our_options(row)

    def attend(q: Tensor, v: Tensor) -> Tensor:
        return bucket_attention(q, None, v, our_buckets(row, q), options)

    return attend


def our_buckets(row: Row, q: Tensor) -> Tensor:
    rotations = draw_rotations(row.heads, row.head_dim, row.n_hashes, row.buckets, "rotation", seed=0)
    return hash_vectors(q, rotations, row.buckets, "rotation", implementation=OURS[row.impl])


def attend_by_oracle(row: Row, q: Tensor, v: Tensor) -> Tensor:
    keys, rule = F.normalize(q, dim=-1), WindowRule(row.window, causal=True)
    return reference_attention(q, keys, v, our_buckets(row, q), rule, scale=row.head_dim**-0.5)


def reformer_pytorch(row: Row, seq_len: int) -> Attend:
    from reformer_pytorch.reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=row.window, n_hashes=row.n_hashes, causal=True)
    return lambda q, v: layer(q.flatten(0, 1), v.flatten(0, 1))[0]


def transformers(row: Row, seq_len: int) -> Attend:
    return transformers_layer(row, seq_len, row.buckets)


def transformers_own(row: Row, seq_len: int) -> Attend:
    return transformers_layer(row, seq_len, None)


def transformers_layer(row: Row, seq_len: int, n_buckets: int | None) -> Attend:
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
        max_position_embeddings=seq_len,
        is_decoder=True,
    )
    layer = LSHSelfAttention(config).to(row.device)
    hidden = torch.empty(1, seq_len, 0, device=row.device)  # read for its shape only
    del layer.query_key, layer.value

    def attend(q: Tensor, v: Tensor) -> Tensor:
        layer.query_key, layer.value = (lambda _, x=x: x.transpose(1, 2).flatten(2) for x in (q, v))
        return layer(hidden).hidden_states

    return attend


def sdpa(row: Row, seq_len: int) -> Attend:
    return lambda q, v: F.scaled_dot_product_attention(q, q, v, is_causal=True)


def by_kernel(backend: SDPBackend) -> Callable[[Row, int], Attend]:
    def build(row: Row, seq_len: int) -> Attend:
        def attend(q: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, q, v, is_causal=True)

        return attend

    return build


def flex(row: Row, seq_len: int) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    reach = row.n_hashes * row.window

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < reach)

    mask = create_block_mask(in_window, None, None, seq_len, seq_len, device=row.device)
    compiled = torch.compile(flex_attention)
    return lambda q, v: compiled(q, q, v, block_mask=mask)


def attend_densely(q: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = q.shape[-1] ** -0.5 * q @ q.transpose(-1, -2)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


IMPLEMENTATION: dict[str, Callable[[Row, int], Attend]] = {
    **dict.fromkeys(OURS, ours),
    "reformer_pytorch": reformer_pytorch,
    "transformers": transformers,
    "transformers_own": transformers_own,
    "sdpa": sdpa,
    "flash": by_kernel(SDPBackend.FLASH_ATTENTION),
    "cudnn": by_kernel(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
}
EXACT = ("sdpa", "flash", "cudnn")
