"""Cases of test_exchange.py, run on each rank: attention over slices is attention over the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from reformer_dist.distributed.mesh import SequenceMesh, make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.models.sequence import SequenceAccess, WholeSequence
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, Rule, WindowRule
from reformer_dist.ops.lsh.next_values import zero_starts
from reformer_dist.parallel import SlicedSequence, exchange_plan

LAST_DOCUMENT = 2**31 - 1  # fills slices after the end of a row


class Mode(NamedTuple):
    """A way to exchange rows, and how many tokens are attended to at a time."""

    per_round: bool
    overlaps: bool
    group_tokens: int


MODES = {"merged": Mode(False, True, 100), "per_round": Mode(True, False, 2**14)}
CAUSAL, TWO_SIDED = WindowRule(8, causal=True), WindowRule(8, causal=False)


@dataclass(frozen=True)
class Case:
    name: str
    rule: Rule
    seq_len: int = 96
    n_buckets: int = 4
    n_hashes: int = 3
    head_dim: int = 8
    n_heads: int = 4
    batch: int = 2
    shared: bool = True
    count_pairs_once: bool = False
    dropout: float = 0.0
    next_value_heads: int = 0
    buckets: str = "random"
    """random, one (all tokens in bucket 0), slices (a rank's tokens share a bucket), wide (few of many)"""
    padding: str = "none"
    """none, some (random tokens), slice (all of the first rank's), all (the first row)"""
    dtype: torch.dtype = torch.float32
    backend: str = "torch"
    documents: bool = False
    own_keys: bool = False
    scale: float = 0.5

    def tensors(self, size: int) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor]:
        """q, (k), v of the whole sequence, bucket ids, mask, gradient of the output."""
        draw = torch.Generator().manual_seed(len(self.name) + self.seq_len)
        shape = (self.batch, self.n_heads, self.seq_len, self.head_dim)
        vectors = [torch.randn(shape, generator=draw).to(self.dtype) for _ in range(2 if self.shared else 3)]
        ids_shape = (self.batch, self.n_heads, self.n_hashes, self.seq_len)
        ids = torch.randint(0, self.n_buckets, ids_shape, generator=draw)
        if self.buckets == "one":
            ids = torch.zeros_like(ids)
        elif self.buckets == "slices":
            n_local = -(-self.seq_len // size)
            ids = (torch.arange(self.seq_len) // n_local % self.n_buckets).expand(ids_shape).contiguous()
        mask = None
        if self.padding != "none":
            mask = torch.rand(self.batch, self.seq_len, generator=draw) < 0.7
            if self.padding == "slice":
                mask = torch.arange(self.seq_len).expand(self.batch, -1) >= -(-self.seq_len // size)
            elif self.padding == "all":
                mask[0] = False
        d_out = torch.randn(shape, generator=draw).to(self.dtype)
        return vectors, ids.to(torch.uint8 if self.n_buckets < 255 else torch.int16), mask, d_out

    def document_ids(self) -> Tensor | None:
        """[B, S]: documents of 0 to 20 tokens, which differ between the rows."""
        if not self.documents:
            return None
        draw = torch.Generator().manual_seed(self.seq_len)
        return (torch.rand(self.batch, self.seq_len, generator=draw) < 0.1).long().cumsum(dim=1)

    def options(self) -> AttentionOptions:
        return AttentionOptions(
            self.rule,
            self.n_buckets,
            scale=self.scale,
            count_pairs_once=self.count_pairs_once,
            dropout=self.dropout,
            next_value_heads=self.next_value_heads,
            dropout_seed=77,
            rows=torch.tensor([5, 2])[: self.batch],
            backend=self.backend,
            own_keys=self.own_keys,
        )

    def query_ids(self, ids: Tensor) -> Tensor | None:
        """Buckets of the queries like ids [B, H, R, S] of the keys, most of which differ."""
        if not self.own_keys:
            return None
        draw = torch.Generator().manual_seed(7)
        return torch.randint(0, self.n_buckets, ids.shape, generator=draw).to(ids.dtype)


def cases() -> list[Case]:
    wide = replace(Case("", CAUSAL), n_buckets=300, seq_len=60)
    one_round = {"n_buckets": 1, "n_hashes": 1, "shared": False}
    sees_self = {causal: WindowRule(8, causal=causal, sees_self=True) for causal in (True, False)}
    found = [
        Case("causal window", CAUSAL),
        Case("tiles of 64", WindowRule(40, causal=True), seq_len=700, n_buckets=2, batch=1),
        Case("window longer than a slice", WindowRule(80, causal=True), seq_len=120, n_buckets=1, n_hashes=2),
        Case("two-sided window", TWO_SIDED, seq_len=101),
        Case("two-sided window longer than a slice", WindowRule(70, causal=False), seq_len=120, n_buckets=1),
        Case("a length that nothing divides", CAUSAL, seq_len=97),
        Case("fewer tokens than ranks", CAUSAL, seq_len=3),
        Case("one bucket", CAUSAL, buckets="one"),
        Case("a bucket for each rank: nothing from some peers", CAUSAL, buckets="slices"),
        replace(wide, name="more buckets than tokens"),
        Case("some padding", CAUSAL, padding="some"),
        Case("two-sided, some padding", TWO_SIDED, padding="some", seq_len=77),
        Case("every masked position at one rank", CAUSAL, padding="slice"),
        Case("a row of padding", CAUSAL, padding="all"),
        Case("dropout", CAUSAL, dropout=0.3, padding="some"),
        Case("pairs once", CAUSAL, count_pairs_once=True, n_buckets=2),
        Case("two-sided pairs once", TWO_SIDED, count_pairs_once=True, n_buckets=2, seq_len=90),
        Case("local", sees_self[True], **one_round),
        Case("local, two-sided, padding", sees_self[False], seq_len=99, padding="some", **one_round),
        Case("own keys, several buckets", CAUSAL, shared=False, dropout=0.1),
        Case("values of the next token", CAUSAL, next_value_heads=3, seq_len=97, padding="some"),
        Case("next values, fewer tokens than ranks", CAUSAL, next_value_heads=4, seq_len=3),
        Case("bf16", CAUSAL, dtype=torch.bfloat16),
        Case("bf16, odd width", CAUSAL, dtype=torch.bfloat16, head_dim=5),
        Case("documents", CAUSAL, seq_len=97, documents=True),
        Case("documents, two-sided, padding, dropout", TWO_SIDED, padding="some", dropout=0.2, documents=True),
        Case("documents, pairs once", CAUSAL, count_pairs_once=True, n_buckets=2, documents=True),
        Case("documents, next values", CAUSAL, next_value_heads=3, seq_len=99, documents=True),
        Case("documents, local", sees_self[True], documents=True, **one_round),
    ]
    own_keys = {"shared": False, "own_keys": True, "scale": 0.25}
    strict = WindowRule(8, causal=True)
    found += [
        Case("own buckets", sees_self[True], seq_len=97, padding="some", count_pairs_once=True, **own_keys),
        Case("own buckets, two-sided", sees_self[False], seq_len=101, dropout=0.2, padding="all", **own_keys),
        Case("own buckets, next values", strict, next_value_heads=2, documents=True, **own_keys),
        Case("own buckets, fewer tokens than ranks", sees_self[True], seq_len=3, **own_keys),
    ]
    by_c = {"backend": "auto", "head_dim": 16}
    found += [
        Case("C: causal window", CAUSAL, **by_c),
        Case("C: long buckets", WindowRule(40, causal=True), seq_len=700, n_buckets=1, batch=1, **by_c),
        Case(
            "C: own buckets, long",
            WindowRule(40, causal=True, sees_self=True),
            seq_len=700,
            n_buckets=2,
            batch=1,
            documents=True,
            count_pairs_once=True,
            dropout=0.2,
            **own_keys,
            **by_c,
        ),
        Case("C: two-sided, own keys", TWO_SIDED, seq_len=97, padding="some", shared=False, dropout=0.2, **by_c),
        Case("C: pairs once, dropout", CAUSAL, count_pairs_once=True, n_buckets=2, dropout=0.2, **by_c),
        Case("C: values of the next token", CAUSAL, next_value_heads=2, seq_len=101, dropout=0.2, **by_c),
        Case("C: local, two-sided", sees_self[False], padding="slice", **one_round, **by_c),
        Case("C: fewer tokens than ranks", CAUSAL, seq_len=3, **by_c),
        replace(wide, name="C: more buckets than tokens", **by_c),
        Case("C: documents", CAUSAL, seq_len=301, n_buckets=2, count_pairs_once=True, documents=True, **by_c),
        Case("C: bf16, a row of padding", CAUSAL, padding="all", dtype=torch.bfloat16, **by_c),
    ]
    chunk = ChunkRule(8, causal=True)
    found += [
        Case("chunks", chunk),
        Case("chunks that divide nothing", replace(chunk, chunk_len=7), seq_len=97, padding="some"),
        Case("fewer chunks than ranks", replace(chunk, chunk_len=48)),
        Case("chunks, two-sided", ChunkRule(8, causal=False, n_before=2, n_after=1), seq_len=90),
        Case("chunks, wrapped", replace(chunk, wrap=True), seq_len=90),
        Case("chunks, wrapped widely", ChunkRule(5, causal=False, n_before=3, n_after=2, wrap=True), seq_len=33),
        Case("chunks, pairs once", replace(chunk, n_before=2), count_pairs_once=True, n_buckets=2),
        Case("chunks, dropout, padding", chunk, dropout=0.2, padding="some"),
    ]
    return found


def attend(
    case: Case,
    sequence: SequenceAccess,
    vectors: list[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    d_out: Tensor,
    query_ids: Tensor | None = None,
) -> list[Tensor]:
    """Output and gradients, run a second time by the kept plan as a recompute would."""
    leaves = [x.clone().requires_grad_() for x in vectors]
    options, documents = case.options(), case.document_ids()
    if documents is not None:
        if isinstance(sequence, SlicedSequence):
            documents = sequence.take(documents, LAST_DOCUMENT)
        options = replace(options, document_ids=documents)
        starts = sequence.document_starts(documents)
        leaves[-1] = zero_starts(leaves[-1], case.next_value_heads, starts).detach().requires_grad_()
    exchange = sequence.make_exchange(ids, options, mask, query_ids)
    k = None if case.shared else leaves[1]
    for _ in range(2):
        out = sequence.bucket_attention(leaves[0], k, leaves[-1], exchange)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def own_slice(sliced: SlicedSequence, x: Tensor) -> Tensor:
    """This rank's slice of [B, H, S, D], with zeros where the sequence has ended."""
    flat = x.movedim(2, -1)
    part = sliced.take(flat.flatten(0, -2), 0)
    return part.view(*flat.shape[:-1], -1).movedim(-1, 2).contiguous()


def own_id_slice(sliced: SlicedSequence, ids: Tensor) -> Tensor:
    """This rank's slice of bucket ids [B, H, R, S]."""
    return own_slice(sliced, ids.transpose(2, 3)).transpose(2, 3)


def own_tensors(
    sliced: SlicedSequence, vectors: list[Tensor], ids: Tensor, mask: Tensor | None, d_out: Tensor
) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor]:
    own_ids = own_id_slice(sliced, ids)
    own_mask = sliced.key_padding_mask(ids.shape[0], ids.device)
    if mask is not None:
        own_mask = sliced.take(mask, False)
    return [own_slice(sliced, x) for x in vectors], own_ids, own_mask, own_slice(sliced, d_out)


def n_real(sliced: SlicedSequence) -> int:
    """Tokens of this rank's slice that are no padding behind the sequence."""
    start = sliced.mesh.slice_index * sliced.n_local
    return min(sliced.n_local, max(0, sliced.seq_len - start))


def check(case: Case, mesh: SequenceMesh, per_round: bool) -> None:
    tensors = case.tensors(mesh.buckets)
    query_ids = case.query_ids(tensors[1])
    whole = attend(case, WholeSequence(), *tensors, query_ids)
    sliced = SlicedSequence(mesh, case.seq_len, per_round=per_round)
    own_query_ids = None if query_ids is None else own_id_slice(sliced, query_ids)
    found = attend(case, sliced, *own_tensors(sliced, *tensors), own_query_ids)
    by_tiles = case.backend == "torch" and isinstance(case.rule, WindowRule)
    is_exact = per_round and by_tiles and case.dtype == torch.float32
    tolerance = 1e-6 if case.dtype == torch.float32 else 0.02
    for number, (right, part) in enumerate(zip(whole, found, strict=True)):
        if not n_real(sliced):
            continue
        right = own_slice(sliced, right)[:, :, : n_real(sliced)].double()
        error = (part[:, :, : n_real(sliced)] - right).abs().max().item()
        allowed = 0.0 if number == 0 and is_exact else tolerance * max(1.0, right.abs().max().item())
        assert error <= allowed, f"{case.name}: output or gradient {number} is off by {error}"


def check_causality(mesh: SequenceMesh, per_round: bool) -> None:
    """Another future, of other buckets too, leaves what came before as it was, on whatever rank."""
    case = Case("causality", CAUSAL, seq_len=150, n_buckets=2)
    vectors, ids, _, d_out = case.tensors(mesh.buckets)
    sliced = SlicedSequence(mesh, case.seq_len, per_round=per_round)
    start = mesh.slice_index * sliced.n_local
    for border in (1, 40, 77, 149):
        outs = []
        for future in (0, 1):
            draw = torch.Generator().manual_seed(border)
            changed = [x.clone() for x in vectors]
            other_ids = ids.clone()
            if future:
                for x in changed:
                    x[:, :, border:] = torch.randn(x[:, :, border:].shape, generator=draw)
                other_ids[..., border:] = 1
            outs.append(attend(case, sliced, *own_tensors(sliced, changed, other_ids, None, d_out))[0])
        past = slice(0, max(0, border - start))
        if not per_round:
            torch.testing.assert_close(outs[0][:, :, past], outs[1][:, :, past], atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(outs[0][:, :, past], outs[1][:, :, past]), f"the future from {border} on is seen"


def check_exact_attention(mesh: SequenceMesh) -> None:
    for seq_len, causal, dropout, padding, documents in (
        (64, True, 0.0, "none", False),
        (37, False, 0.0, "some", False),
        (37, True, 0.4, "some", False),
        (37, True, 0.4, "some", True),
    ):
        case = Case("exact", CAUSAL, seq_len=seq_len, n_heads=8, head_dim=4, shared=False, padding=padding)
        document_ids = replace(case, documents=documents).document_ids()
        sliced = SlicedSequence(mesh, seq_len)
        tensors = case.tensors(mesh.size)
        outcomes = []
        for sequence, (vectors, _, mask, d_out) in (
            (WholeSequence(), tensors),
            (sliced, own_tensors(sliced, *tensors)),
        ):
            leaves = [x.clone().requires_grad_() for x in vectors]
            own = document_ids
            if own is not None and sequence is sliced:
                own = sliced.take(own, LAST_DOCUMENT)
            options = ExactOptions(causal, dropout, seed=3, rows=torch.tensor([2, 6]), document_ids=own)
            out = sequence.exact_attention(*leaves, options, mask)
            outcomes.append([out.detach(), *torch.autograd.grad(out, leaves, d_out)])
        for right, part in zip(*outcomes, strict=True):
            right = own_slice(sliced, right)[:, :, : n_real(sliced)]
            torch.testing.assert_close(part[:, :, : n_real(sliced)], right, atol=1e-6, rtol=1e-6)


def run_case(job: Runtime, mesh: tuple[int, int], mode: str, case: Case) -> None:
    with mesh_of(job, mesh, mode) as of_job:
        check(case, of_job, MODES[mode].per_round)


def run_causality(job: Runtime, mesh: tuple[int, int], mode: str) -> None:
    with mesh_of(job, mesh, mode) as of_job:
        check_causality(of_job, MODES[mode].per_round)


def run_exact_attention(job: Runtime, mesh: tuple[int, int]) -> None:
    check_exact_attention(make_mesh(job, *mesh))


@contextmanager
def mesh_of(job: Runtime, mesh: tuple[int, int], mode: str) -> Iterator[SequenceMesh]:
    before = exchange_plan.GROUP_TOKENS["cpu"]
    exchange_plan.GROUP_TOKENS["cpu"] = MODES[mode].group_tokens
    try:
        yield make_mesh(job, *mesh, overlaps=MODES[mode].overlaps)
    finally:
        exchange_plan.GROUP_TOKENS["cpu"] = before
