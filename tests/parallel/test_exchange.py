"""Attention over a sequence on several ranks, against the same on one: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from exchange_cases import MODES, Case, cases, run_case, run_causality, run_exact_attention

MESHES = [(1, 2), (2, 1), (1, 4), (2, 2)]
SLOW_MESHES = [(1, 3), (4, 1), (1, 8), (2, 4)]
ALL = [
    pytest.param(mesh, id="{}x{}".format(*mesh), marks=[pytest.mark.slow] if mesh in SLOW_MESHES else [])
    for mesh in (*MESHES, *SLOW_MESHES)
]
by_mesh = pytest.mark.parametrize("mesh", ALL)
by_mode = pytest.mark.parametrize("mode", MODES)


@by_mesh
@by_mode
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_slices_are_the_whole(run_on: Callable[..., None], mesh: tuple[int, int], mode: str, case: Case) -> None:
    run_on(mesh[0] * mesh[1], run_case, mesh=mesh, mode=mode, case=case)


@by_mesh
@by_mode
def test_the_future_is_not_seen(run_on: Callable[..., None], mesh: tuple[int, int], mode: str) -> None:
    run_on(mesh[0] * mesh[1], run_causality, mesh=mesh, mode=mode)


@pytest.mark.parametrize("mesh", [param for param in ALL if 8 % (param.values[0][0] * param.values[0][1]) == 0])
def test_exact_attention_over_slices(run_on: Callable[..., None], mesh: tuple[int, int]) -> None:
    run_on(mesh[0] * mesh[1], run_exact_attention, mesh=mesh)
