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
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_choice, check_integer
from reformer_dist.ops.lsh.options import LARGEST_N_BUCKETS
from reformer_dist.ops.tensor_cache import cache_tensors

LARGEST_SIZE = 2**20  # of heads, hashes and head dimensions
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


def check_factors(n_buckets: int, scheme: str, factors: Factors | None = None) -> Factors:
    """The factors of n_buckets, by default those of `bucket_factors`. Raises ValueError if they can't be."""
    check_choice("hash_scheme", scheme, LARGEST_FACTOR)
    check_integer("n_buckets", n_buckets, least=1, most=LARGEST_N_BUCKETS)
    if factors is None:
        return bucket_factors(n_buckets, LARGEST_FACTOR[scheme])
    is_valid = all(isinstance(f, int) and f > 0 and f % 2 == 0 for f in factors)
    if not is_valid or math.prod(factors) != n_buckets:
        raise ValueError(f"factors={factors}: must be even numbers with the product n_buckets={n_buckets}")
    return factors


def check_rotations(vectors: Tensor, rotations: Tensor, n_columns: int) -> None:
    """Raises ValueError unless vectors are [B, H, S, D] and rotations float32 [H, R, D, n_columns]."""
    TensorChecks().floats("vectors", vectors, "B H S D")
    sizes = {"H": vectors.shape[1], "D": vectors.shape[3], "columns": n_columns}
    TensorChecks(**sizes).floats("rotations", rotations, "H R D columns")
    if rotations.dtype != torch.float32:
        raise ValueError(
            f"rotations.dtype={rotations.dtype}: must be torch.float32, as draw_rotations returns them"
        )
    if rotations.device.type != "cpu" and rotations.device != vectors.device:
        raise ValueError(f"rotations.device={rotations.device}: must be cpu or that of vectors, {vectors.device}")


def count_columns(factors: Factors, scheme: str) -> int:
    """Columns of the rotations."""
    return sum(factors) // 2 if scheme == "rotation" else len(factors)


def _check_rotation_sizes(n_heads: int, head_dim: int, n_hashes: int, seed: int) -> None:
    sizes = {"n_heads": n_heads, "head_dim": head_dim, "n_hashes": n_hashes}
    for name, size in sizes.items():
        check_integer(name, size, least=1, most=LARGEST_SIZE)
    check_integer("seed", seed, least=-(2**63), most=2**64 - 1)


# One entry per layer, of a step and the next: shared by the micro-batches of a step, and by the tokens of a
# generated text.
@cache_tensors(maxsize=128)
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
    independent normal. factors: of n_buckets; default `bucket_factors`. Raises ValueError.
    """
    _check_rotation_sizes(n_heads, head_dim, n_hashes, seed)
    columns = count_columns(check_factors(n_buckets, scheme, factors), scheme)
    drawn = _draw_normal(n_heads, n_hashes, head_dim, columns, seed=seed)
    return _orthogonalize(drawn) if scheme == "rotation" else drawn


@functools.cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="rotations")


os.register_at_fork(after_in_child=_background.cache_clear)  # a fork has no threads


def draw_rotations_ahead(
    n_heads: int,
    head_dim: int,
    n_hashes: int,
    n_buckets: int,
    scheme: str,
    seed: int,
    *,
    factors: Factors | None = None,
) -> Future[Tensor]:
    """Starts `draw_rotations` in the background, which leaves its result in the cache.

    Nobody needs to wait for the future: a call of `draw_rotations` that comes too early draws the same itself.
    """
    sizes = (n_heads, head_dim, n_hashes, n_buckets)
    return _background().submit(draw_rotations, *sizes, scheme, seed, factors=factors)


def _draw_normal(*shape: int, seed: int) -> Tensor:
    """Independent normal numbers, whatever the default dtype and device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


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


@cache_tensors(maxsize=64)
def seeded_rotations(
    n_heads: int, head_dim: int, n_hashes: int, n_buckets: int, seed: int, *, factors: Factors | None = None
) -> Tensor:
    """The rotations that Hugging Face's Reformer draws on a CPU with `hash_seed` set; shapes as `draw_rotations`.

    The same for every step and for every layer of the same sizes. Raises ValueError.
    """
    _check_rotation_sizes(n_heads, head_dim, n_hashes, seed)
    columns = count_columns(check_factors(n_buckets, "rotation", factors), "rotation")
    return _draw_normal(n_heads, head_dim, n_hashes, columns, seed=seed).transpose(1, 2)


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
