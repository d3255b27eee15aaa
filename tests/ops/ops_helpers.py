"""Random attention inputs, drawn by hypothesis as sizes and a seed, and their comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, Rule, WindowRule, bucket_attention
from reformer_dist.ops.lsh.native import library
from reformer_dist.ops.lsh.reference import reference_attention

needs_compiler = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason=f"native attention: {library.unavailable_reason()}"
)
N_BUCKETS = [1, 2, 4, 8, 64]


@dataclass(frozen=True)
class Case:
    """Sizes of one attention call; its tensors are a function of `seed`."""

    batch: int
    n_heads: int
    n_hashes: int
    seq_len: int
    head_dim: int
    options: AttentionOptions
    padding: str
    """none, some (random tokens), or row (some, and one row that is padding only)."""
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v [B, H, S, D] float32, bucket ids [B, H, R, S], key padding mask [B, S] or None."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.n_heads, self.seq_len, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        ids_shape = (self.batch, self.n_heads, self.n_hashes, self.seq_len)
        bucket_ids = torch.randint(0, self.options.n_buckets, ids_shape, generator=generator, dtype=torch.uint8)
        if self.padding == "none":
            return q, k, v, bucket_ids, None
        mask = torch.rand(self.batch, self.seq_len, generator=generator) < 0.7
        if self.padding == "row":
            mask[0] = False
        return q, k, v, bucket_ids, mask

    def query_ids(self) -> Tensor | None:
        """Bucket ids [B, H, R, S] of the queries, if those of the keys are their own; many agree with them."""
        if not self.options.own_keys:
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        ids = self.tensors()[3]
        others = torch.randint(0, self.options.n_buckets, ids.shape, generator=generator, dtype=torch.uint8)
        return torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, others)


def window_rules() -> st.SearchStrategy[Rule]:
    windows = st.sampled_from([1, 2, 3, 5, 8, 13, 16, 33, 100])
    return st.builds(WindowRule, window=windows, causal=st.booleans(), sees_self=st.booleans())


@st.composite
def chunk_rules(draw: st.DrawFn) -> ChunkRule:
    causal = draw(st.booleans())
    return ChunkRule(
        chunk_len=draw(st.sampled_from([1, 2, 3, 5, 8, 16])),
        causal=causal,
        n_before=draw(st.integers(0, 3)),
        n_after=draw(st.integers(0, 2)),
        wrap=draw(st.booleans()),
        sees_self=draw(st.booleans()),
        round_to=draw(st.sampled_from([1, 1, 6, 40])),
    )


@st.composite
def cases(draw: st.DrawFn, rules: st.SearchStrategy[Rule], longest: int = 80, n_hashes: int = 4) -> Case:
    rule = draw(rules)
    is_wrapped = isinstance(rule, ChunkRule) and rule.wrap
    options = AttentionOptions(
        rule=rule,
        n_buckets=draw(st.sampled_from(N_BUCKETS)),
        scale=draw(st.sampled_from([1.0, 0.25])),
        count_pairs_once=not is_wrapped and draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3])),
        dropout_seed=draw(st.integers(0, 2**63 - 1)),
    )
    return Case(
        batch=draw(st.integers(1, 2)),
        n_heads=draw(st.integers(1, 3)),
        n_hashes=draw(st.integers(1, n_hashes)),
        seq_len=draw(st.integers(1, longest)),
        head_dim=draw(st.integers(1, 16)),
        options=options,
        padding=draw(st.sampled_from(["none", "some", "row"])),
        seed=draw(st.integers(0, 2**31)),
    )


def own_key_cases(backend: str, **limits: int) -> st.SearchStrategy[Case]:
    """Cases whose keys have buckets of their own."""

    def with_own_keys(case: Case) -> Case:
        rule = case.options.rule
        rule = rule if rule.causal else replace(rule, sees_self=True)
        return replace(case, options=replace(case.options, rule=rule, own_keys=True, backend=backend))

    return cases(window_rules(), **limits).map(with_own_keys)


def run_fast(
    inputs: tuple[Tensor, Tensor, Tensor],
    bucket_ids: Tensor,
    options: AttentionOptions,
    mask: Tensor | None,
    query_ids: Tensor | None = None,
) -> Tensor:
    return bucket_attention(*inputs, bucket_ids, options, mask, query_ids)


def run_oracle(
    inputs: tuple[Tensor, Tensor, Tensor],
    bucket_ids: Tensor,
    options: AttentionOptions,
    mask: Tensor | None,
    query_ids: Tensor | None = None,
) -> Tensor:
    return reference_attention(
        *inputs,
        bucket_ids,
        options.rule,
        scale=options.scale,
        key_padding_mask=mask,
        count_pairs_once=options.count_pairs_once,
        dropout=options.dropout,
        dropout_seed=options.dropout_seed,
        query_ids=query_ids,
        attends_alone=options.attends_alone,
    )


def outputs_and_grads(case: Case, dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor, Tensor]]:
    """(name, fast, oracle in float64) of the output and of the gradients, from inputs rounded to `dtype`."""
    *inputs, bucket_ids, mask = case.tensors()
    inputs = [x.to(dtype) for x in inputs]
    d_out = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(case.seed + 1)).to(dtype)
    found = []
    for run, wide in ((run_fast, dtype), (run_oracle, torch.float64)):
        leaves = tuple(x.to(wide).requires_grad_() for x in inputs)
        out = run(leaves, bucket_ids, case.options, mask, case.query_ids())
        found.append([out.detach(), *torch.autograd.grad(out, leaves, d_out.to(wide))])
    return list(zip(("output", "dq", "dk", "dv"), *found, strict=True))


def assert_fast_is_oracle(case: Case, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    for name, fast, oracle in outputs_and_grads(case, dtype):
        assert fast.dtype == dtype
        error = (fast.double() - oracle).abs().max().item()
        assert error <= tolerance * (1 + oracle.abs().max().item()), f"{name} is off by {error}"
