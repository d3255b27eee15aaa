"""Whether LSH attention computes on this device what the slow definition says: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from reformer_dist.doctor.findings import Finding, failed, ok
from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention, draw_rotations, hash_vectors
from reformer_dist.ops.lsh.reference import reference_attention
from reformer_dist.ops.lsh.shared_keys import shared_keys

SHAPE = (2, 2, 197, 32)  # rows, heads, an odd length, width
N_HASHES, N_BUCKETS, WINDOW = 2, 8, 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest number

Attention = Callable[[Tensor, None, Tensor, Tensor, AttentionOptions], Tensor]


def attention(device: torch.device, fast: Attention = bucket_attention) -> Iterator[Finding]:
    """The path that a run on this device takes, in float32 and bf16."""
    for dtype, tolerance in TOLERANCE.items():
        name = f"LSH attention, {str(dtype).removeprefix('torch.')}"
        errors = largest_errors(device, dtype, fast)
        words = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        words = f"largest relative errors on {device.type}: {words}"
        if all(error <= tolerance for error in errors.values()):
            yield ok(name, words)
        else:
            advice = "do not train here: report it with these lines, and the versions above"
            yield failed(name, f"{words}; at most {tolerance:g} is right", advice)


def largest_errors(device: torch.device, dtype: torch.dtype, fast: Attention) -> dict[str, float]:
    """By what: the largest difference from the definition, relative to its largest number; inf for nan."""
    draw = torch.Generator().manual_seed(0)
    q, v, d_out = (torch.randn(SHAPE, generator=draw).to(device, dtype) for _ in range(3))
    rotations = draw_rotations(SHAPE[1], SHAPE[3], N_HASHES, N_BUCKETS, "rotation", seed=1)
    ids = hash_vectors(q, rotations, N_BUCKETS, "rotation")
    rule = WindowRule(WINDOW, causal=True)
    options = AttentionOptions(rule, N_BUCKETS, scale=1.0)

    def slow(q: Tensor, v: Tensor) -> Tensor:
        return reference_attention(q, shared_keys(q), v, ids, rule, scale=1.0)

    right = _with_gradients(slow, q.float(), v.float(), d_out.float())
    found = _with_gradients(lambda q, v: fast(q, None, v, ids, options), q, v, d_out)
    errors = {}
    for what, one, other in zip(("output", "dq", "dv"), right, found, strict=True):
        error = ((one - other.float()).abs().max() / one.abs().max()).item()
        errors[what] = error if error == error else float("inf")
    return errors


def _with_gradients(
    function: Callable[[Tensor, Tensor], Tensor], q: Tensor, v: Tensor, d_out: Tensor
) -> tuple[Tensor, ...]:
    q, v = (t.detach().requires_grad_() for t in (q, v))
    out = function(q, v)
    return out.detach(), *torch.autograd.grad(out, (q, v), d_out)
