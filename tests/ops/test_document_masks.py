"""Documents in one row attend as if each were a sequence of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, cases, needs_compiler, own_key_cases, window_rules
from torch import Tensor

from reformer_dist.ops.exact_attention import ExactOptions, exact_attention
from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, WindowRule, bucket_attention, lsh_attention
from reformer_dist.ops.lsh.coverage import Coverage, measure_coverage
from reformer_dist.ops.lsh.shared_keys import shared_keys

LENGTHS = (1, 130, 2, 37, 300, 16, 214)
"""Of documents: some of one token, others longer than a window, a tile and a span of the C library."""


def ids_of(*rows: tuple[int, ...]) -> Tensor:
    """[B, S] document ids of rows with documents of these lengths."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def drawn_documents(case: Case) -> Tensor:
    """[B, S], with gaps between the ids."""
    draw = torch.Generator().manual_seed(case.seed)
    return (torch.rand(case.batch, case.seq_len, generator=draw) < 0.15).long().mul(3).cumsum(dim=1)


def attend(case: Case, options: AttentionOptions, *, shared: bool) -> list[Tensor]:
    """Output and gradients, in float64 by the reference."""
    q, k, v, ids, mask = case.tensors()
    query_ids = case.query_ids()
    wide = torch.float64 if options.backend == "reference" else torch.float32
    leaves = [x.to(wide).requires_grad_() for x in ((q, v) if shared else (q, k, v))]
    out = bucket_attention(leaves[0], None if shared else leaves[1], leaves[-1], ids, options, mask, query_ids)
    d_out = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(wide)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
@settings(max_examples=20, deadline=None)
@given(cases(window_rules()), st.booleans(), st.integers(0, 2))
def test_backends_match_the_reference(backend: str, case: Case, shared: bool, next_value_heads: int) -> None:
    if backend == "native":
        case = replace(case, head_dim=16)
    n_next = 0 if case.options.rule.sees_self else min(next_value_heads, case.n_heads)
    options = replace(case.options, document_ids=drawn_documents(case), next_value_heads=n_next)
    found = attend(case, replace(options, backend=backend), shared=shared)
    expected = attend(case, replace(options, backend="reference"), shared=shared)
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
@settings(max_examples=20, deadline=None)
@given(own_key_cases("torch"), st.just(16))
def test_keys_of_their_own_match_the_reference(backend: str, case: Case, head_dim: int) -> None:
    case = replace(case, head_dim=head_dim)
    options = replace(case.options, document_ids=drawn_documents(case))
    found = attend(case, replace(options, backend=backend), shared=False)
    expected = attend(case, replace(options, backend="reference"), shared=False)
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), right, atol=2e-5, rtol=2e-5)


def alone_and_packed(options: AttentionOptions, *, own_keys: bool, dtype: torch.dtype) -> list[list[Tensor]]:
    """Output and gradients of every document, [H, length, D] each: alone, and in a row with the others."""
    documents = ids_of(LENGTHS)
    seq_len = documents.shape[1]
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, seq_len, 16, generator=draw).to(dtype) for _ in range(4 if own_keys else 3)]
    ids = torch.randint(0, options.n_buckets, (1, 2, 2, seq_len), generator=draw)
    query_ids = torch.randint(0, options.n_buckets, ids.shape, generator=draw) if options.own_keys else None

    def run(part: slice, document_ids: Tensor | None) -> list[Tensor]:
        *leaves, d_out = (x[:, :, part].contiguous() for x in tensors)
        leaves = [x.requires_grad_() for x in leaves]
        own = replace(options, document_ids=document_ids)
        queries = None if query_ids is None else query_ids[..., part]
        k = leaves[1] if own_keys else None
        out = bucket_attention(leaves[0], k, leaves[-1], ids[..., part], own, query_ids=queries)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    parts = [slice(end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]
    together = run(slice(None), documents)
    return [
        [torch.cat(x, dim=2) for x in zip(*(run(part, None) for part in parts), strict=True)],
        together,
    ]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sees_self", [False, True])
def test_on_the_c_path_a_document_is_bitwise_the_document_alone(dtype, own_keys, once, causal, sees_self) -> None:
    for window, n_buckets in ((5, 4), (200, 1), (150, 2)):
        rule = WindowRule(window, causal, sees_self)
        options = AttentionOptions(rule, n_buckets, scale=0.3, count_pairs_once=once, backend="native")
        alone, packed = alone_and_packed(options, own_keys=own_keys, dtype=dtype)
        assert all(map(torch.equal, alone, packed)), (window, n_buckets)


@needs_compiler
@pytest.mark.parametrize("causal", [True, False])
def test_with_buckets_of_their_own_for_keys_too(causal: bool) -> None:
    for window, n_buckets in ((5, 4), (200, 1), (150, 2)):
        rule = WindowRule(window, causal, sees_self=True)
        options = AttentionOptions(
            rule, n_buckets, scale=0.3, count_pairs_once=True, own_keys=True, backend="native"
        )
        alone, packed = alone_and_packed(options, own_keys=True, dtype=torch.float32)
        assert all(map(torch.equal, alone, packed)), (window, n_buckets)


@needs_compiler
def test_next_values_end_with_the_document() -> None:
    options = AttentionOptions(WindowRule(50, True), 4, scale=0.3, next_value_heads=1, backend="native")
    alone, packed = alone_and_packed(options, own_keys=False, dtype=torch.float32)
    assert all(map(torch.equal, alone, packed))
    blind = AttentionOptions(WindowRule(50, True), 4, scale=0.3, next_value_heads=0, backend="native")
    assert not torch.equal(alone_and_packed(blind, own_keys=False, dtype=torch.float32)[0][0], alone[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("has_padding", [True, False])
def test_exact_attention(causal: bool, has_padding: bool) -> None:
    documents = ids_of((3, 1, 20, 9), (30, 1, 1, 1))
    draw = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(2, 3, 33, 16, generator=draw) for _ in range(4))
    mask = torch.rand(2, 33, generator=draw) < 0.7 if has_padding else None
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    options = ExactOptions(causal, 0.0, 0, None, documents)
    out = options.attend(*leaves, mask, first_head=0, n_heads=3)
    found = [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
    for row in range(2):
        for document in documents[row].unique():
            part = documents[row] == document
            alone = [x[row : row + 1, :, part].requires_grad_() for x in (q, k, v)]
            of_mask = None if mask is None else mask[row : row + 1, part]
            right = exact_attention(*alone, causal=causal, key_padding_mask=of_mask)
            expected = [right.detach(), *torch.autograd.grad(right, alone, d_out[row : row + 1, :, part])]
            for x, y in zip(found, expected, strict=True):
                assert torch.equal(x[row : row + 1, :, part], y)


def test_dropout_of_exact_attention_differs_between_documents() -> None:
    x = torch.ones(1, 1, 64, 16)
    values = torch.randn(1, 1, 32, 16, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2, 1)
    options = ExactOptions(True, 0.5, 3, None, ids_of((32, 32)))
    first, second = options.attend(x, x, values, None, first_head=0, n_heads=1).split(32, dim=2)
    assert not torch.equal(first, second)


def test_coverage_counts_pairs_within_documents() -> None:
    documents = ids_of((20, 31), (51,))
    q = torch.randn(2, 2, 51, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 4, (2, 2, 2, 51), generator=torch.Generator().manual_seed(1))
    options = AttentionOptions(WindowRule(6, True), 4, scale=1.0)
    found = measure_coverage(q, shared_keys(q), ids, replace(options, document_ids=documents))
    expected = Coverage()
    for row, part in ((0, slice(0, 20)), (0, slice(20, 51)), (1, slice(None))):
        own = q[row : row + 1, :, part]
        expected.add(measure_coverage(own, shared_keys(own), ids[row : row + 1, :, :, part], options))
    for name in ("pairs", "pairs_met", "queries"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.mass, expected.mass)


def test_lsh_attention_of_documents() -> None:
    draw = torch.Generator().manual_seed(0)
    qk, v = (torch.randn(1, 2, 60, 16, generator=draw) for _ in range(2))
    out = lsh_attention(qk, v, n_buckets=4, document_ids=ids_of((25, 35)))
    alone = [
        lsh_attention(x, y, n_buckets=4) for x, y in zip(qk.split([25, 35], 2), v.split([25, 35], 2), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(alone, dim=2))


@pytest.mark.parametrize(
    ("document_ids", "rule", "message"),
    [
        (torch.tensor([[0, 1, 0, 1]]), WindowRule(2, True), "document_ids: .*decrease"),
        (torch.tensor([[0, 0, 1, 2**31]]), WindowRule(2, True), "document_ids=2147483648"),
        (torch.tensor([[-1, 0, 0, 0]]), WindowRule(2, True), "document_ids=-1"),
        (torch.tensor([[0, 0, 1]]), WindowRule(2, True), r"document_ids.shape=\[1, 3\]"),
        (torch.tensor([[0.0, 0, 1, 1]]), WindowRule(2, True), "document_ids.dtype"),
        (torch.tensor([[0, 0, 1, 1]]), ChunkRule(2, True), "document_ids: .*WindowRule"),
    ],
)
def test_refused(document_ids, rule, message) -> None:
    x = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=message):
        options = AttentionOptions(rule, 2, scale=1.0, document_ids=document_ids)
        bucket_attention(x, None, x, torch.zeros(1, 1, 1, 4, dtype=torch.int64), options)
