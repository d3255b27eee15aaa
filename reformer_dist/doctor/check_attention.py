"""Check of LSH attention on a device against the reference implementation: output and gradients."""

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
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative to the largest value

AttentionOp = Callable[[Tensor, None, Tensor, Tensor, AttentionOptions], Tensor]


def check_attention(device: torch.device, attention: AttentionOp = bucket_attention) -> Iterator[Finding]:
    """Checks the backend that a run on this device uses, in float32 and bf16."""
    for dtype, tolerance in TOLERANCE.items():
        name = f"LSH attention, {str(dtype).removeprefix('torch.')}"
        errors = largest_errors(device, dtype, attention)
        shown = ", ".join(f"{tensor} {error:.1e}" for tensor, error in errors.items())
        message = f"largest relative errors on {device.type}: {shown}"
        if all(error <= tolerance for error in errors.values()):
            yield ok(name, message)
        else:
            advice = "do not train here; report it with these lines and the versions above"
            yield failed(name, f"{message}; must be at most {tolerance:g}", advice)


def largest_errors(device: torch.device, dtype: torch.dtype, attention: AttentionOp) -> dict[str, float]:
    """Largest error of the output and each gradient, relative to the reference's largest value; inf for NaN."""
    generator = torch.Generator().manual_seed(0)
    q, v, d_out = (torch.randn(SHAPE, generator=generator).to(device, dtype) for _ in range(3))
    rotations = draw_rotations(SHAPE[1], SHAPE[3], N_HASHES, N_BUCKETS, "rotation", seed=1)
    ids = hash_vectors(q, rotations, N_BUCKETS, "rotation")
    rule = WindowRule(WINDOW, causal=True)
    options = AttentionOptions(rule, N_BUCKETS, scale=1.0)

    def reference(q: Tensor, v: Tensor) -> Tensor:
        return reference_attention(q, shared_keys(q), v, ids, rule, scale=1.0)

    all_expected = _with_gradients(reference, q.float(), v.float(), d_out.float())
    all_actual = _with_gradients(lambda q, v: attention(q, None, v, ids, options), q, v, d_out)
    errors = {}
    for name, expected, actual in zip(("output", "dq", "dv"), all_expected, all_actual, strict=True):
        error = ((expected - actual.float()).abs().max() / expected.abs().max()).item()
        errors[name] = error if error == error else float("inf")
    return errors


def _with_gradients(
    function: Callable[[Tensor, Tensor], Tensor], q: Tensor, v: Tensor, d_out: Tensor
) -> tuple[Tensor, ...]:
    q, v = (t.detach().requires_grad_() for t in (q, v))
    out = function(q, v)
    return out.detach(), *torch.autograd.grad(out, (q, v), d_out)
