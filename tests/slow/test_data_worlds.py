"""Real runs of 1, 2 and 4 processes, of several threads and sequence degrees, each going on in another world."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.launch import run_ranks
from support.tiny import tiny_overrides, write_tiny_dataset

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.data import consumed_hash, merge_states

pytestmark = [pytest.mark.slow, pytest.mark.jobs]
SCRIPT = Path(__file__).parents[1] / "training" / "two_ranks.py"
LAYOUTS = {1: (1,), 2: (1, 2), 4: (1, 2)}
"""Sequence degrees that are tried with so many processes."""
WORKERS = (0, 1, 3)


def data_state(folder: Path) -> dict[str, Any]:
    return merge_states([rank["data"] for rank in CheckpointReader(folder).rank_states])


def test_every_world_goes_on_with_the_samples_of_any_other(tmp_path: Path) -> None:
    """Each world trains 6 steps and saves all of them; then each goes on from a step of another world."""
    data = write_tiny_dataset(tmp_path / "data")
    worlds = [(size, degree) for size, degrees in LAYOUTS.items() for degree in degrees]

    def run(size: int, plan: dict[str, list[str]]) -> None:
        path, found = tmp_path / "plan.json", tmp_path / "found.json"
        path.write_text(json.dumps(plan))
        run_ranks(SCRIPT, size, [path, found], timeout=400)
        said = json.loads(found.read_text())
        assert {name: words for name, words in said.items() if name in plan and any(words)} == {}

    def overrides(name: str, degree: int, workers: int, *more: str) -> list[str]:
        settings = (f"parallel.sequence={degree}", f"data.workers={workers}", "trainer.save_every=1")
        return tiny_overrides(data, tmp_path / name, *settings, *more)

    for size, degrees in LAYOUTS.items():
        plan = {
            f"{size}x{degree}-{workers}": overrides(f"{size}x{degree}-{workers}", degree, workers)
            for degree, workers in product(degrees, WORKERS)
        }
        run(size, plan)
    right = {step: data_state(tmp_path / "1x1-0" / "checkpoints" / f"step-{step:08d}") for step in range(1, 7)}
    assert len({consumed_hash(state) for state in right.values()}) == 6
    for name, step in product([f"{s}x{d}-{w}" for (s, d), w in product(worlds, WORKERS)], right):
        assert data_state(tmp_path / name / "checkpoints" / f"step-{step:08d}") == right[step], (name, step)

    resumed = []
    for size, degrees in LAYOUTS.items():
        plan = {}
        for number, (degree, (other, of_other)) in enumerate(product(degrees, worlds)):
            step, workers = 1 + number % 5, WORKERS[number % 3]
            name = f"{size}x{degree}-after-{other}x{of_other}"
            source = tmp_path / f"{other}x{of_other}-{WORKERS[-1 - number % 3]}/checkpoints/step-{step:08d}"
            plan[name] = overrides(name, degree, workers, f"resume={source}")
        run(size, plan)
        resumed += list(plan)
    for name in resumed:
        assert data_state(tmp_path / name / "checkpoints" / "step-00000006") == right[6], name
