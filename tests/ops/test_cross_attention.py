"""Cross attention matches its reference: outputs and gradients, dense and tiled, for any two lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reformer_dist.ops.lsh import CrossKeys, CrossOptions, cross, cross_attention, cross_tiles
from reformer_dist.ops.lsh.reference import reference_cross_attention


@dataclass(frozen=True)
class Case:
    n_queries: int
    n_keys: int
    n_rounds: int
    options: CrossOptions
    padding: str = "some"
    seed: int = 0
    batch: int = 2
    n_heads: int = 3
    head_dim: int = 8

    def tensors(self) -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor | None]:
        """q, k, v; ids of queries and keys; mask of the keys."""
        generator = torch.Generator().manual_seed(self.seed)
        units = (self.batch, self.n_heads)
        lengths = (self.n_queries, self.n_keys, self.n_keys)
        qkv = [torch.randn(*units, length, self.head_dim, generator=generator) for length in lengths]
        query_ids, key_ids = (
            torch.randint(
                0, self.options.n_buckets, (*units, self.n_rounds, n), generator=generator, dtype=torch.uint8
            )
            for n in (self.n_queries, self.n_keys)
        )
        if self.padding == "none":
            return qkv, (query_ids, key_ids), None
        mask = torch.rand(self.batch, self.n_keys, generator=generator) < 0.7
        if self.padding == "row":
            mask[0] = False
        return qkv, (query_ids, key_ids), mask


@st.composite
def cases(draw: st.DrawFn, longest: int = 60) -> Case:
    batch = draw(st.integers(1, 2))
    options = CrossOptions(
        n_buckets=draw(st.sampled_from([1, 2, 4, 64])),
        scale=draw(st.sampled_from([1.0, 0.3])),
        count_pairs_once=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        dropout_seed=draw(st.integers(0, 2**63 - 1)),
        rows=draw(st.sampled_from([None, torch.tensor([3, 1])[:batch]])),
    )
    return Case(
        n_queries=draw(st.integers(1, longest)),
        n_keys=draw(st.integers(1, longest)),
        n_rounds=draw(st.integers(1, 4)),
        options=options,
        padding=draw(st.sampled_from(["none", "some", "row"])),
        seed=draw(st.integers(0, 2**31)),
        batch=batch,
        n_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 12)),
    )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    options: CrossOptions,
    mask: Tensor | None,
) -> Tensor:
    query_ids, key_ids = ids or (None, None)
    return cross_attention(q, query_ids, CrossKeys(k, v, key_ids, mask), options)


def by_oracle(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _, ids, mask = case.tensors()
    options = case.options
    return reference_cross_attention(
        q,
        k,
        v,
        *ids,
        scale=options.scale,
        key_padding_mask=mask,
        count_pairs_once=options.count_pairs_once,
        dropout=options.dropout,
        dropout_seed=options.dropout_seed,
        head_indices=options.head_indices(q.shape[0], q.shape[1], q.device),
    )


def assert_is_oracle(case: Case, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    inputs, ids, mask = case.tensors()
    inputs = [x.to(dtype) for x in inputs]
    fast, slow = ([x.to(kind).requires_grad_() for x in inputs] for kind in (dtype, torch.float64))
    out = run(*fast, ids, case.options, mask)
    expected_out = by_oracle(case, *slow)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(case.seed + 1)).to(dtype)
    found = [out, *torch.autograd.grad(out, fast, d_out)]
    expected = [expected_out, *torch.autograd.grad(expected_out, slow, d_out.double())]
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs).abs().max().item()
        assert error <= tolerance * (1 + theirs.abs().max().item()), f"{name} is off by {error}"


@settings(max_examples=60)
@given(cases())
def test_dense(case: Case) -> None:
    assert_is_oracle(case)


@settings(max_examples=100)
@given(cases(), st.sampled_from([1, 60, 10_000]), st.sampled_from([1, 600, 10**6]))
def test_tiles(case: Case, group_tokens: int, chunk_scores: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross, "DENSE_PAIRS", 0)
        patch.setitem(cross_tiles.GROUP_TOKENS, "cpu", group_tokens)
        patch.setitem(cross_tiles.CHUNK_SCORES, "cpu", chunk_scores)
        assert_is_oracle(case)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(700, 90), (37, 1200), (513, 511)])
def test_long_sequences(shape: tuple[int, int], dropout: float) -> None:
    assert shape[0] * shape[1] > cross.DENSE_PAIRS
    options = CrossOptions(4, 0.5, dropout=dropout, dropout_seed=3)
    assert_is_oracle(Case(*shape, 2, options, batch=1, n_heads=2))
    assert_is_oracle(Case(*shape, 1, replace(options, n_buckets=2), padding="row", n_heads=1))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_bf16(dropout: float) -> None:
    for shape in ((20, 30), (300, 200)):
        options = CrossOptions(4, 0.5, dropout=dropout, dropout_seed=3)
        assert_is_oracle(Case(*shape, 2, options), torch.bfloat16, tolerance=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(5, 9), (300, 200)])
def test_without_ids_a_query_attends_to_every_key(shape: tuple[int, int], dropout: float) -> None:
    options = CrossOptions(1, 0.3, dropout=dropout, dropout_seed=3)
    case = Case(*shape, 1, options, padding="row")
    qkv, _, mask = case.tensors()
    found = run(*qkv, None, options, mask)
    assert torch.allclose(found, by_oracle(case, *qkv), atol=1e-6)
    assert found[0].abs().max() == 0  # an empty source has zero output
    assert found[1].abs().min() > 0


def test_a_query_attends_to_its_bucket_only() -> None:
    """Worked example: two keys in the query's bucket, one in another, one in its bucket that is padding."""
    q, k = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 1.0, 5.0, 7.0]).view(1, 1, 4, 1)
    v = torch.tensor([1.0, 2.0, 40.0, 80.0]).view(1, 1, 4, 1)
    ids = torch.tensor([3, 0]).view(1, 1, 1, 2), torch.tensor([3, 3, 1, 3]).view(1, 1, 1, 4)
    mask = torch.tensor([[True, True, True, False]])
    out = run(q, k, v, ids, CrossOptions(4, 1.0), mask).flatten()
    e = torch.tensor(1.0).exp()
    assert out.tolist() == pytest.approx([((1 + 2 * e) / (1 + e)).item(), 0.0])


def test_memory_of_tiles_does_not_grow_with_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a few tiles exist at a time, never those of all pairs."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    monkeypatch.setitem(cross_tiles.CHUNK_SCORES, "cpu", 2**15)
    case = Case(900, 700, 1, CrossOptions(4, 0.5), batch=1, n_heads=1, padding="none")
    inputs, ids, _ = case.tensors()
    leaves = [x.requires_grad_() for x in inputs]
    with Watch():
        run(*leaves, ids, case.options, None).sum().backward()
    assert largest <= 2**16 < 900 * 700
