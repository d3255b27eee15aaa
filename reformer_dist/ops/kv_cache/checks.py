"""Checks of the arguments of the caches."""

from __future__ import annotations

from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_range


def check_prompt(first: Tensor | None, **tensors: Tensor) -> None:
    """Raises ValueError unless the tensors of a prompt are [B, H, S, D], and first is None or [B] integers."""
    checks = TensorChecks()
    for name, x in tensors.items():
        checks.floats(name, x, "B H S D")
    if first is not None:
        checks.integers("first", first, "B")


def check_token(cached: Tensor, **tensors: Tensor) -> None:
    """Raises ValueError unless tensors are those of one token, [B, H, 1, D], like the cached [B, H, S, D]."""
    checks = TensorChecks()
    checks.floats("the cache", cached, "B H S D")
    for name, x in tensors.items():
        checks.floats(name, x, "B H 1 D")


def check_rows(rows: Tensor, batch: int) -> None:
    """Raises ValueError unless rows are indices [N] of the batch."""
    TensorChecks().integers("rows", rows, "N")
    check_range("rows", rows, batch, limit="rows of the cache")
