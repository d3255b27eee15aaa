"""Partitions of the sorted order, attended by the kernels, combine to the reference: outputs and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import CASES, KernelCase
from support.shards import attend_by_partition

from reformer_dist.ops.lsh import AttentionOptions, WindowRule
from reformer_dist.ops.lsh.reference import reference_attention
from reformer_dist.ops.lsh.shared_keys import shared_keys

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# those of both sides take the longest in the interpreter
WINDOWS = [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if "both sides" in name else [])
    for name, case in CASES.items()
    if isinstance(case.rule, WindowRule)
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", WINDOWS)
def test_partitions_match_the_reference(case: KernelCase) -> None:
    (q, k, v), ids, mask = case.tensors(DEVICE)
    options = AttentionOptions(
        case.rule, case.n_buckets, 0.5, count_pairs_once=case.once, dropout=case.dropout, dropout_seed=7,
        rows=case.rows(DEVICE), backend="triton", document_ids=case.document_ids(DEVICE),
        own_keys=case.own_keys,
    )  # fmt: skip
    query_ids = case.query_ids(ids)
    d_out = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(v)
    actual = attend_by_partition(q, None if case.shared else k, v, ids, options, mask, d_out, 3, query_ids)
    leaves = [x.detach().float().clone().requires_grad_() for x in ((q, v) if case.shared else (q, k, v))]
    expected = reference_attention(
        leaves[0],
        shared_keys(leaves[0]) if case.shared else leaves[1],
        leaves[-1],
        ids,
        case.rule,
        scale=0.5,
        key_padding_mask=mask,
        count_pairs_once=case.once,
        dropout=case.dropout,
        dropout_seed=7,
        head_indices=options.head_indices(case.batch, 2, v.device),
        document_ids=options.document_ids,
        query_ids=query_ids,
        attends_alone=options.attends_alone,
    )
    expected = [expected.detach(), *torch.autograd.grad(expected, leaves, d_out.float())]
    if case.shared:  # the key of a zero query has no derivative
        expected[1][0, 0, 3] = actual[1][0, 0, 3] = 0.0
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= case.tolerance * max(1.0, other.abs().max())


def test_partition_without_rows() -> None:
    case = replace(CASES["window"], seq_len=3)
    (q, _, v), ids, _ = case.tensors(DEVICE)
    actual = [
        attend_by_partition(q, None, v, ids, AttentionOptions(case.rule, 4, 0.5, backend=name), None, v, 12)
        for name in ("triton", "torch")
    ]
    for one, other in zip(*actual, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
