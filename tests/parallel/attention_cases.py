"""Run by test_exchange.py on several ranks: attention over slices is attention over the whole sequence."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reformer_dist.distributed import runtime
from reformer_dist.distributed.grid import SequenceGrid, make_grid
from reformer_dist.models.sequence import WholeSequence
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, Rule, WindowRule
from reformer_dist.parallel import SlicedSequence, plan

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
    buckets: str = "random"
    """random, one (all tokens in bucket 0), slices (a rank's tokens share a bucket), wide (few of many)"""
    padding: str = "none"
    """none, some (random tokens), slice (all of the first rank's), all (the first row)"""
    dtype: torch.dtype = torch.float32

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

    def options(self) -> AttentionOptions:
        return AttentionOptions(
            self.rule,
            self.n_buckets,
            scale=0.5,
            count_pairs_once=self.count_pairs_once,
            dropout=self.dropout,
            dropout_seed=77,
            first_row=5,
        )


def cases() -> list[Case]:
    wide = replace(Case("", CAUSAL), n_buckets=300, seq_len=60)
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
        Case("local", replace(CAUSAL, sees_self=True), n_buckets=1, n_hashes=1, shared=False, buckets="one"),
        Case(
            "local, two-sided, padding", replace(TWO_SIDED, sees_self=True), 99, 1, 1, shared=False, padding="some"
        ),
        Case("own keys, several buckets", CAUSAL, shared=False, dropout=0.1),
        Case("bf16", CAUSAL, dtype=torch.bfloat16),
        Case("bf16, odd width", CAUSAL, dtype=torch.bfloat16, head_dim=5),
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


def attend(case: Case, sequence, vectors: list[Tensor], ids: Tensor, mask: Tensor | None, d_out: Tensor):
    """Output and gradients, run a second time by the kept plan as a recompute would."""
    leaves = [x.clone().requires_grad_() for x in vectors]
    kept: dict = {}
    for _ in range(2):
        q, v = leaves[0], leaves[-1]
        k = None if case.shared else leaves[1]
        out = sequence.bucket_attention(q, k, v, ids, case.options(), mask, kept)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def check(case: Case, grid: SequenceGrid, merge_returns: bool) -> None:
    vectors, ids, mask, d_out = case.tensors(grid.buckets)
    whole = attend(case, WholeSequence(), vectors, ids, mask, d_out)
    sliced = SlicedSequence(grid, case.seq_len, merge_returns=merge_returns)

    def own(x: Tensor) -> Tensor:  # [B, H, S, D]
        flat = x.movedim(2, -1).flatten(0, -2)
        return sliced.take(flat, 0).view(*x.movedim(2, -1).shape[:-1], -1).movedim(-1, 2).contiguous()

    own_mask = sliced.key_padding_mask(case.batch, torch.device("cpu"))
    if mask is not None:
        own_mask = sliced.take(mask, False)
    own_ids = own(ids.transpose(2, 3)).transpose(2, 3)
    found = attend(case, sliced, [own(x) for x in vectors], own_ids, own_mask, own(d_out))
    start = grid.slice_index * sliced.n_local
    n_real = min(sliced.n_local, max(0, case.seq_len - start))
    is_exact = not merge_returns and isinstance(case.rule, WindowRule) and case.dtype == torch.float32
    for name, right, part in zip(
        ("output", "dq", "dk", "dv") if not case.shared else ("output", "dq", "dv"), whole, found
    ):
        right, part = own(right)[:, :, :n_real].double(), part[:, :, :n_real].double()
        error = (part - right).abs().max().item() if part.numel() else 0.0
        size = right.abs().max().item() if part.numel() else 0.0
        tolerance = 1e-6 if case.dtype == torch.float32 else 0.02
        if name == "output" and is_exact:
            tolerance = 0.0
        assert error <= tolerance * max(1.0, size), f"{case.name}, {name}: off by {error} of {size}"


def check_exact(grid: SequenceGrid) -> None:
    draw = torch.Generator().manual_seed(1)
    for seq_len, causal, dropout, padded in (
        (64, True, 0.0, False),
        (37, False, 0.0, True),
        (37, True, 0.4, True),
    ):
        q, k, v, d_out = (torch.randn(2, 8, seq_len, 4, generator=draw) for _ in range(4))
        mask = torch.rand(2, seq_len, generator=draw) < 0.7 if padded else None
        options = ExactOptions(causal=causal, dropout=dropout, seed=3, first_row=2)
        sliced = SlicedSequence(grid, seq_len)

        def run(sequence, vectors, mask, d_out):
            leaves = [x.clone().requires_grad_() for x in vectors]
            out = sequence.exact_attention(*leaves, options, mask)
            return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

        def own(x: Tensor) -> Tensor:
            return (
                torch.stack([sliced.take(head.movedim(1, 2).flatten(0, 1), 0) for head in x])
                .view(2, 8, 4, -1)
                .movedim(3, 2)
            )

        whole = run(WholeSequence(), (q, k, v), mask, d_out)
        own_mask = sliced.take(mask, False) if mask is not None else sliced.key_padding_mask(2, q.device)
        found = run(sliced, [own(x) for x in (q, k, v)], own_mask, own(d_out))
        n_real = min(sliced.n_local, max(0, seq_len - grid.slice_index * sliced.n_local))
        for right, part in zip(whole, found, strict=True):
            torch.testing.assert_close(part[:, :, :n_real], own(right)[:, :, :n_real], atol=1e-6, rtol=1e-6)


def main() -> None:
    torch.set_num_threads(1)
    job = runtime.start()
    grids = [tuple(map(int, word.split("x"))) for word in sys.argv[1:]]
    for heads, buckets in grids:
        for merge_returns, overlaps, group_tokens in ((True, True, 100), (False, False, 2**14)):
            grid = make_grid(job, heads, buckets, overlaps=overlaps)
            plan.GROUP_TOKENS["cpu"] = group_tokens
            for case in cases():
                check(case, grid, merge_returns)
        if 8 % grid.size == 0:
            check_exact(grid)
    job.barrier()
    if job.is_main:
        print(f"{len(cases())} cases hold")
    runtime.stop()


if __name__ == "__main__":
    main()
