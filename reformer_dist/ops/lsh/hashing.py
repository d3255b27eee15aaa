"""Locality-sensitive hashing: vectors -> bucket ids in [0, n_buckets).

`rotation` is the angular hash of the paper (section 2, "Locality sensitive hashing"): argmax of [xR, -xR]. The
columns of R are those of a random rotation, as in the paper's source (Andoni et al. 2015, "Practical and Optimal
LSH for Angular Distance").
`floor` is the random-projection hash floor(Rx / gamma) of the unit vector. Both produce one digit per factor of
n_buckets (mixed radix), since a single argmax over all buckets would cost head_dim * n_buckets per token, which
is quadratic in the length at a fixed bucket size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# The widest argmax that is still cheap, and the most cells that one projection usefully distinguishes.
LARGEST_FACTOR = {"rotation": 64, "floor": 8}
# Added to the squared column norms, so that the Cholesky factorization succeeds for nearly dependent columns.
SMALLEST_PIVOT = 1e-10
# The cells of one projection together span this many standard deviations (projections are standard normal).
FLOOR_SPAN = 4.0


@functools.cache
def bucket_factors(n_buckets: int, largest: int) -> tuple[int, ...]:
    """Even factors of n_buckets: as few and as balanced as possible with each at most `largest`.

    If there is no such factorization (n_buckets = 2 * prime), the one with the smallest maximum.
    Raises ValueError if n_buckets is odd and not 1.
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
    """`n_factors` even factors of `number` with the smallest maximum, ascending, or None."""
    if n_factors == 1:
        return (number,) if number % 2 == 0 else None
    best: tuple[int, ...] | None = None
    for factor in range(2, number // 2 + 1, 2):
        if factor**n_factors > number:
            break
        if number % factor == 0:
            rest = _balanced(number // factor, n_factors - 1)
            # on ties the later one, whose smallest factor is larger
            if rest is not None and (best is None or max(rest) <= max(best)):
                best = (factor, *rest)
    return best


def bucket_dtype(n_buckets: int) -> torch.dtype:
    """The smallest integer dtype for ids in [0, n_buckets]; n_buckets itself marks padding."""
    if n_buckets < 2**8:
        return torch.uint8
    return torch.int16 if n_buckets < 2**15 else torch.int32


def single_bucket_ids(x: Tensor) -> Tensor:
    """Bucket ids [B, H, 1, S] for x [B, H, S, D]: one round with every token in bucket 0."""
    return torch.zeros(1, dtype=bucket_dtype(1), device=x.device).expand(*x.shape[:2], 1, x.shape[2])


Factors = tuple[int, ...]


# One entry per layer and step: shared by the micro-batches of a step, and by the tokens of a generated text.
@functools.lru_cache(maxsize=64)
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
    """Random projections [n_heads, n_hashes, head_dim, columns], float32 on the CPU. Cached: do not modify.

    The same on every machine. Columns of `rotation` are orthogonal in blocks of head_dim, those of `floor`
    independent normal. factors: of n_buckets; default `bucket_factors`.
    """
    factors = bucket_factors(n_buckets, LARGEST_FACTOR[scheme]) if factors is None else factors
    columns = sum(factors) // 2 if scheme == "rotation" else len(factors)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_heads, n_hashes, head_dim, columns, generator=generator)
    return _orthogonalize(drawn) if scheme == "rotation" else drawn


def _orthogonalize(columns: Tensor) -> Tensor:
    """Orthogonalizes normal columns [..., D, n] in blocks of D, scaled to their mean norm sqrt(D).

    With independent columns the longest win too often and the digits of different factors are correlated: some
    buckets get ten times the mean. Orthogonal columns fill buckets as chance would. Computed in float64, so that
    the result rounds to the same float32 on every machine.
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
    """The rotations that Hugging Face's Reformer draws on a CPU with `hash_seed` set; shapes as `draw_rotations`.

    The same for every step and for every layer of the same sizes.
    """
    factors = bucket_factors(n_buckets, LARGEST_FACTOR["rotation"]) if factors is None else factors
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_heads, head_dim, n_hashes, sum(factors) // 2, generator=generator).transpose(1, 2)


def hash_vectors(
    vectors: Tensor, rotations: Tensor, n_buckets: int, scheme: str, *, factors: Factors | None = None
) -> Tensor:
    """Bucket ids [B, H, R, S] of vectors [B, H, S, D] under rotations [H, R, D, columns].

    Hashes in float32 for every dtype, one round at a time, so that no more than [B, H, S, columns] projections
    exist at once. Not differentiable.
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
        columns = projected[..., start : start + factor // 2]
        # argmax of |p| finds the column of max [p, -p] and the sign its half, without a concatenation
        column = columns.abs().argmax(dim=-1, keepdim=True)
        is_negative = columns.gather(-1, column) < 0
        bucket += radix * (column + is_negative * (factor // 2)).squeeze(-1)
        radix, start = radix * factor, start + factor // 2
    return bucket


def _floor_digits(projected: Tensor, factors: tuple[int, ...]) -> Tensor:
    """floor(p / gamma): the cells of a factor together span FLOOR_SPAN, the outermost include the tails."""
    bucket = torch.zeros(projected.shape[:-1], dtype=torch.int64, device=projected.device)
    radix = 1
    for column, factor in enumerate(factors):
        gamma = FLOOR_SPAN / factor
        cell = torch.floor(projected[..., column] / gamma).to(torch.int64) + factor // 2
        bucket += radix * cell.clamp_(0, factor - 1)
        radix *= factor
    return bucket
