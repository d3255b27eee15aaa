"""Matrix products and scores of the attention kernels; C is the `tiles.KernelConstants` of a call."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = bool(triton.knobs.runtime.interpret)
# The interpreter multiplies bfloat16 as if it were integers.
WIDENS = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b, C: tl.constexpr):
    """a @ b with float32 sums."""
    if WIDENS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=C.precision)


@triton.jit
def shared_key_factors(squares, dtype: tl.constexpr, scale):
    """Factors of keys k / |k| in this dtype, from |k|^2."""
    # 2^-10 keeps the weights of pairs within the range of fp16
    SHORTEST: tl.constexpr = 2.0**-10 if dtype == tl.float16 else 1e-12
    return scale * LOG2_E * tl.rsqrt(tl.maximum(squares, SHORTEST * SHORTEST))


@triton.jit
def score_factors(k, scale, C: tl.constexpr):
    """Factors [keys] that turn products with keys k [keys, D] into base-2 scores. Shared keys are k / |k|."""
    if C.shared:
        wide = k.to(tl.float32)
        factors = shared_key_factors(tl.sum(wide * wide, 1), k.dtype, scale)
    else:
        factors = tl.full([k.shape[0]], LOG2_E, tl.float32) * scale
    return factors
