"""Any number of ranks, ZeRO stage and sequence degree goes on with the checkpoint of any other."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from support.launch import run_ranks
from support.tiny import write_tiny_dataset

pytestmark = [pytest.mark.slow, pytest.mark.jobs]
SCRIPT = Path(__file__).with_name("elastic_ranks.py")
WORLDS = (1, 2, 4)
SAVED, LAST = 3, 8


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if row["step"] > SAVED}


def test_every_layout_goes_on_with_the_checkpoint_of_every_other(tmp_path: Path) -> None:
    """Weights and moments are those that were saved, bit for bit, and 5 steps those of the uncut run."""
    data, root = write_tiny_dataset(tmp_path / "data"), tmp_path / "runs"
    for what, ranks in product(("write", "read"), WORLDS):
        run_ranks(SCRIPT, ranks, [what, data, root], timeout=900)
    found = {}
    for ranks in WORLDS:
        found |= json.loads((root / f"found-{ranks}.json").read_text())
    layouts = sorted(path.parent.name for path in root.glob("*/held.safetensors"))
    assert len(layouts) == 22
    assert sorted(found) == sorted(f"{target}-after-{source}" for target, source in product(layouts, layouts))
    assert {name: words for name, words in found.items() if words} == {}
    uncut = {source: losses(root / source) for source in layouts}
    assert {tuple(steps) for steps in uncut.values()} == {tuple(range(SAVED + 1, LAST + 1))}
    for name in found:
        source = name.partition("-after-")[2]
        assert losses(root / name) == pytest.approx(uncut[source], rel=1e-6), name
