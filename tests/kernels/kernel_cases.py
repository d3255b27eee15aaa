"""Small attention calls that together reach every branch of the kernels, with errors against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, Rule, WindowRule, bucket_attention
from reformer_dist.ops.lsh.reference import reference_attention
from reformer_dist.ops.lsh.shared_keys import shared_keys


@dataclass(frozen=True)
class KernelCase:
    rule: Rule
    n_buckets: int = 4
    n_hashes: int = 2
    seq_len: int = 45
    head_dim: int = 16
    once: bool = False
    dropout: float = 0.0
    padding: bool = False
    """Masks some tokens of the first batch row and all of the second."""
    shared: bool = False
    crowded: bool = False
    """In the first round all tokens are in the last bucket, and the others are empty."""
    documents: bool = False
    own_keys: bool = False
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5

    @property
    def batch(self) -> int:
        """Two rows where they differ: by a mask or by their dropout. The interpreter takes long enough for one."""
        return 2 if self.padding or self.dropout else 1

    def rows(self, device: str) -> Tensor:
        """[B]: numbers of the rows in the whole batch."""
        return torch.tensor([5, 2], device=device)[: self.batch]

    def document_ids(self, device: str) -> Tensor | None:
        """[B, S]: documents of 9 tokens, and of 11 in the second row."""
        if not self.documents:
            return None
        lengths = torch.tensor([[9], [11]])[: self.batch]
        return (torch.arange(self.seq_len) // lengths).to(device)

    def tensors(self, device: str) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """q, k, v [B, 2, S, D] as views of [B, S, 2, D] (a projection), ids [B, 2, R, S], mask [B, S]."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.seq_len, 2, self.head_dim)
        drawn = [torch.randn(shape, generator=generator).to(self.dtype).transpose(1, 2) for _ in range(3)]
        ids = torch.randint(0, self.n_buckets, (self.batch, 2, self.n_hashes, self.seq_len), generator=generator)
        if self.crowded:
            ids[:, :, 0] = self.n_buckets - 1
        mask = None
        if self.padding:
            mask = torch.rand(2, self.seq_len, generator=generator) < 0.7
            mask[1] = False
            mask = mask.to(device)
        if self.shared:
            drawn[0][0, 0, 3] = 0.0  # a zero query has no direction
        return [x.to(device) for x in drawn], ids.to(device, torch.uint8), mask

    def query_ids(self, ids: Tensor) -> Tensor | None:
        """Buckets of the queries like ids of the keys, of which half differ."""
        if not self.own_keys:
            return None
        draw = torch.Generator().manual_seed(2)
        others = torch.randint(0, self.n_buckets, ids.shape, generator=draw).to(ids)
        return torch.where((torch.rand(ids.shape, generator=draw) < 0.5).to(ids.device), ids, others)


CASES = {
    "window": KernelCase(WindowRule(7, True)),
    "window of both sides": KernelCase(WindowRule(7, False), padding=True),
    "window over several blocks": KernelCase(WindowRule(40, True), n_buckets=1, n_hashes=1, seq_len=71),
    "one token": KernelCase(WindowRule(7, True), seq_len=1),
    "mostly empty buckets": KernelCase(WindowRule(7, True), n_buckets=16, n_hashes=1, seq_len=20),
    "one full bucket": KernelCase(WindowRule(20, True), crowded=True, padding=True, dropout=0.3),
    "local": KernelCase(WindowRule(9, True, sees_self=True), n_buckets=1, n_hashes=1, dropout=0.3),
    "local of both sides": KernelCase(WindowRule(9, False, sees_self=True), n_buckets=1, n_hashes=1, padding=True),
    "shared keys": KernelCase(WindowRule(9, True), shared=True, padding=True),
    "shared keys in bf16": KernelCase(
        WindowRule(9, True), shared=True, dtype=torch.bfloat16, tolerance=0.06, head_dim=32
    ),
    "pairs once": KernelCase(WindowRule(9, True), n_hashes=3, once=True, n_buckets=2, padding=True),
    "pairs once, both sides": KernelCase(WindowRule(9, False), n_hashes=3, once=True, n_buckets=2, dropout=0.2),
    "48 wide": KernelCase(WindowRule(9, True), head_dim=48),
    "128 wide": KernelCase(WindowRule(9, False), head_dim=128, n_hashes=1),
    "bf16": KernelCase(WindowRule(9, True), dtype=torch.bfloat16, tolerance=0.06, dropout=0.2),
    "long tiles": KernelCase(
        WindowRule(70, True), n_buckets=2, seq_len=300, shared=True, dtype=torch.bfloat16, tolerance=0.06
    ),
    "long tiles of both sides": KernelCase(
        WindowRule(70, False), n_buckets=2, seq_len=300, padding=True, dtype=torch.bfloat16, tolerance=0.06
    ),
    "documents": KernelCase(WindowRule(9, True), documents=True, shared=True, padding=True),
    "documents, both sides, once": KernelCase(
        WindowRule(20, False), n_buckets=1, documents=True, once=True, dropout=0.2, seq_len=71
    ),
    "own buckets": KernelCase(WindowRule(7, True, True), own_keys=True, padding=True, crowded=True),
    "own buckets of both sides": KernelCase(
        WindowRule(7, False, True), own_keys=True, dropout=0.2, documents=True, n_hashes=1
    ),
    "own buckets, once": KernelCase(WindowRule(9, True), own_keys=True, once=True, n_buckets=2),
    "own buckets, long tiles": KernelCase(
        WindowRule(70, True, True),
        n_buckets=2,
        n_hashes=1,
        seq_len=150,
        own_keys=True,
        dtype=torch.bfloat16,
        tolerance=0.06,
    ),
    "fp16": KernelCase(WindowRule(9, True), dtype=torch.float16, tolerance=0.01),
    "chunks": KernelCase(ChunkRule(16, True), padding=True),
    "short chunks of both sides": KernelCase(ChunkRule(5, False, 2, 1), padding=True, dropout=0.2),
    "chunks, pairs once": KernelCase(ChunkRule(5, False, 2, 1), n_hashes=3, once=True),
    "wrapped chunks": KernelCase(ChunkRule(8, True, 1, 0, True), n_hashes=3, dropout=0.3),
    "wrapped chunks that meet twice": KernelCase(
        ChunkRule(4, False, 3, 2, True), n_hashes=1, seq_len=9, padding=True
    ),
    "local chunks": KernelCase(
        ChunkRule(8, False, 1, 1, True, sees_self=True, round_to=24),
        n_buckets=1,
        n_hashes=1,
        seq_len=30,
        padding=True,
    ),
}


def errors(case: KernelCase, device: str) -> dict[str, float]:
    """Errors of the output and of each gradient relative to the largest value of the reference, in float64."""
    inputs, ids, mask = case.tensors(device)
    settings = {"count_pairs_once": case.once, "dropout": case.dropout, "dropout_seed": 123456789012345}
    options = AttentionOptions(
        case.rule,
        case.n_buckets,
        0.3,
        **settings,
        rows=case.rows(device),
        backend="triton",
        document_ids=case.document_ids(device),
        own_keys=case.own_keys,
    )
    query_ids = case.query_ids(ids)
    d_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)

    q, k, v = (x.detach().requires_grad_() for x in inputs)
    leaves = (q, v) if case.shared else (q, k, v)
    out = bucket_attention(q, None if case.shared else k, v, ids, options, mask, query_ids)
    grads = torch.autograd.grad(out, leaves, d_out)
    assert out.dtype == case.dtype and all(x.dtype == case.dtype for x in grads)

    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    keys = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-12) if case.shared else k
    if case.shared:  # round the keys as the kernels do
        keys = keys + (shared_keys(inputs[0]).double() - keys).detach()
    settings |= {"document_ids": options.document_ids, "query_ids": query_ids}
    settings["attends_alone"] = options.attends_alone
    settings["head_indices"] = options.head_indices(case.batch, 2, inputs[0].device)
    expected = reference_attention(q, keys, v, ids, case.rule, scale=0.3, key_padding_mask=mask, **settings)
    expected_grads = torch.autograd.grad(expected, (q, v) if case.shared else (q, k, v), d_out.double())
    if case.shared:
        # the key of a zero query has no derivative
        grads[0][0, 0, 3] = 0
        expected_grads[0][0, 0, 3] = 0
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    names = ("output", "dq", "dv") if case.shared else ("output", "dq", "dk", "dv")
    return {
        name: ((a.detach().double() - b.detach()).abs().max() / (1 + b.detach().abs().max())).item()
        for name, (a, b) in zip(names, pairs, strict=True)
    }
