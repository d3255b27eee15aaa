"""Locality-sensitive hashing: vectors -> bucket ids in [0, n_buckets).

`rotation` is the angular hash of the paper (section 2, "Locality sensitive hashing"): argmax of [xR, -xR]. R is
part of a rotation, as where the paper has it from (Andoni et al. 2015, "Practical and Optimal LSH for Angular
Distance").
`floor` is the random-projection form floor(Rx / gamma) on the unit vector. Both are written in mixed radix
over factors of n_buckets, since one argmax over all buckets would cost head_dim * n_buckets per token, which
is quadratic in the length once buckets keep their size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# The widest argmax that is still cheap, and the most cells that one projection tells apart usefully.
LARGEST_FACTOR = {"rotation": 64, "floor": 8}
# Added to squared lengths of columns, so that columns which are nearly dependent don't end the program either.
SMALLEST_PIVOT = 1e-10
# Projections of a unit vector are standard normal: the cells of one projection span this many deviations.
FLOOR_SPAN = 4.0


@functools.cache
def bucket_factors(n_buckets: int, largest: int) -> tuple[int, ...]:
    """Even factors of n_buckets, as few and as near to one another as keeps each at most `largest`.

    Where no such product exists (n_buckets = 2 * prime), the factors with the smallest maximum are taken.
    """
    if n_buckets == 1:
        return ()
    if n_buckets % 2:
        raise ValueError(f"n_buckets={n_buckets}: must be 1 or an even number")
    best: tuple[int, ...] = (n_buckets,)
    n_factors = 1
    while max(best) > largest:
        n_factors += 1
        candidate = _balanced(n_buckets, n_factors)
        if candidate is None:
            break
        best = candidate
    return best


def _balanced(number: int, n_factors: int) -> tuple[int, ...] | None:
    """`n_factors` even factors of `number` with the smallest maximum, ascending; None if there are none."""
    if n_factors == 1:
        return (number,) if number % 2 == 0 else None
    best: tuple[int, ...] | None = None
    for factor in range(2, number // 2 + 1, 2):
        if factor**n_factors > number:
            break
        if number % factor == 0:
            rest = _balanced(number // factor, n_factors - 1)
            # of equal maxima the later one, whose smallest factor is larger
            if rest is not None and (best is None or max(rest) <= max(best)):
                best = (factor, *rest)
    return best


def bucket_dtype(n_buckets: int) -> torch.dtype:
    """The smallest integer type for ids in [0, n_buckets]; n_buckets itself marks padding."""
    if n_buckets < 2**8:
        return torch.uint8
    return torch.int16 if n_buckets < 2**15 else torch.int32


def single_bucket_ids(x: Tensor) -> Tensor:
    """Ids [B, H, 1, S] of x [B, H, S, D]: one round, in which all share bucket 0."""
    return torch.zeros(1, dtype=bucket_dtype(1), device=x.device).expand(*x.shape[:2], 1, x.shape[2])


Factors = tuple[int, ...]


@functools.lru_cache(
    maxsize=64
)  # of as many layers: micro-batches of a step and tokens of a text ask for the same
def draw_rotations(
    n_heads: int,
    head_dim: int,
    n_hashes: int,
    n_buckets: int,
    scheme: str,
    seed: int,
    *,
    factors: Factors | None = None,
) -> Tensor:
    """Random projections [n_heads, n_hashes, head_dim, columns], float32 on the CPU: alike everywhere; only read.

    Those of `rotation` are across one another, head_dim at a time, those of `floor` independent and normal.
    factors: of n_buckets, those of `bucket_factors` if None.
    """
    factors = bucket_factors(n_buckets, LARGEST_FACTOR[scheme]) if factors is None else factors
    columns = sum(factors) // 2 if scheme == "rotation" else len(factors)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_heads, n_hashes, head_dim, columns, generator=generator)
    return _orthogonal(drawn) if scheme == "rotation" else drawn


def _orthogonal(columns: Tensor) -> Tensor:
    """Normal columns [..., D, n] made those of random rotations, D of them each, times sqrt(D): their mean length.

    Of independent columns the longest win too often, and those of one factor go with those of another: some
    buckets get ten times the mean, these what chance gives. Float64 lets all machines round to equal numbers.
    """
    head_dim = columns.shape[-2]
    rotations = []
    for drawn in columns.double().split(head_dim, dim=-1):
        products = drawn.mT @ drawn
        products.diagonal(dim1=-2, dim2=-1).add_(SMALLEST_PIVOT)
        upper = torch.linalg.cholesky(products, upper=True)
        rotations.append(torch.linalg.solve_triangular(upper, drawn, upper=True, left=False))
    return (torch.cat(rotations, dim=-1) * head_dim**0.5).float()


@functools.lru_cache(maxsize=64)
def seeded_rotations(
    n_heads: int, head_dim: int, n_hashes: int, n_buckets: int, seed: int, *, factors: Factors | None = None
) -> Tensor:
    """The rotations that Hugging Face's Reformer draws on a CPU where its `hash_seed` is set: as `draw_rotations`.

    Every layer of the same sizes gets the same ones, and so does every step.
    """
    factors = bucket_factors(n_buckets, LARGEST_FACTOR["rotation"]) if factors is None else factors
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_heads, head_dim, n_hashes, sum(factors) // 2, generator=generator).transpose(1, 2)


def hash_vectors(
    vectors: Tensor, rotations: Tensor, n_buckets: int, scheme: str, *, factors: Factors | None = None
) -> Tensor:
    """Bucket ids [B, H, R, S] of vectors [B, H, S, D] under rotations [H, R, D, columns].

    Hashes in float32 whatever the dtype of the vectors, one round after another, so that no more than
    [B, H, S, columns] numbers exist at a time. No gradient flows.
    """
    batch, n_heads, seq_len, _ = vectors.shape
    n_hashes = rotations.shape[1]
    ids = torch.zeros(batch, n_heads, n_hashes, seq_len, dtype=bucket_dtype(n_buckets), device=vectors.device)
    if n_buckets == 1:
        return ids
    factors = bucket_factors(n_buckets, LARGEST_FACTOR[scheme]) if factors is None else factors
    digits = _rotation_digits if scheme == "rotation" else _floor_digits
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        x = vectors.detach().float()
        if scheme == "floor":
            x = torch.nn.functional.normalize(x, dim=-1)
        for round_ in range(n_hashes):
            projected = x @ rotations[:, round_].to(x.device)
            ids[:, :, round_] = digits(projected, factors).to(ids.dtype)
    return ids


def _rotation_digits(projected: Tensor, factors: tuple[int, ...]) -> Tensor:
    """argmax of [p, -p] within each factor's columns, in mixed radix."""
    bucket = torch.zeros(projected.shape[:-1], dtype=torch.int64, device=projected.device)
    radix, start = 1, 0
    for factor in factors:
        part = projected[..., start : start + factor // 2]
        # |p| has its maximum where [p, -p] has; the sign tells which half. Nothing is concatenated.
        column = part.abs().argmax(dim=-1, keepdim=True)
        is_negative = part.gather(-1, column) < 0
        bucket += radix * (column + is_negative * (factor // 2)).squeeze(-1)
        radix, start = radix * factor, start + factor // 2
    return bucket


def _floor_digits(projected: Tensor, factors: tuple[int, ...]) -> Tensor:
    """floor(p / gamma), where a factor's cells together span FLOOR_SPAN and the outermost take the tails."""
    bucket = torch.zeros(projected.shape[:-1], dtype=torch.int64, device=projected.device)
    radix = 1
    for column, factor in enumerate(factors):
        gamma = FLOOR_SPAN / factor
        cell = torch.floor(projected[..., column] / gamma).to(torch.int64) + factor // 2
        bucket += radix * cell.clamp_(0, factor - 1)
        radix *= factor
    return bucket
