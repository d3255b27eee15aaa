"""Documents that do not see one another, in rows that several ranks share, are each document alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from document_cases import run_attention, run_model

from reformer_dist.ops.lsh.native.library import unavailable_reason

MESHES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
by_mesh = pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "{}x{}".format(*mesh))


@by_mesh
@pytest.mark.parametrize("kind", ["lsh C", "local C", "exact"])  # tiles of PyTorch are in test_exchange.py
def test_attention(run_on: Callable[..., None], mesh: tuple[int, int], kind: str) -> None:
    if kind.endswith(" C") and unavailable_reason() is not None:
        pytest.skip(f"native attention: {unavailable_reason()}")
    run_on(mesh[0] * mesh[1], run_attention, mesh=mesh, kind=kind)


@pytest.mark.parametrize(("mesh", "per_round"), [((2, 1), False), ((1, 2), True), ((2, 2), False), ((1, 4), True)])
def test_a_model(run_on: Callable[..., None], mesh: tuple[int, int], per_round: bool) -> None:
    run_on(mesh[0] * mesh[1], run_model, mesh=mesh, per_round=per_round)
