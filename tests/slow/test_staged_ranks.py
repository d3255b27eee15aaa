"""Staged runs at every ZeRO stage, on 1, 2 and 4 ranks: the same rows and losses, exact over resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.events import scalars
from support.launch import run_ranks
from support.tiny import tiny_overrides
from support.weights import assert_same

from reformer_dist.checkpoint.files import step_folder

pytestmark = [pytest.mark.slow, pytest.mark.jobs]
SCRIPT = Path(__file__).parents[1] / "training" / "two_ranks.py"
STAGED = (
    "stages=[{until: 2, data.seq_len: 32, data.batch_size: 8, trainer.micro_batch_size: 2, model.n_buckets: 2},"
    "{until_tokens: 1024, model.n_hashes: 2, model.window: 8, model.local_window: 8},"
    "{data.seq_len: 128, data.batch_size: 4, model.rotary_base: 500}]",
    *("model.position=rotary", "trainer.save_every=1"),
)
VARIANTS = {
    1: {"plain": ()},
    2: {
        "zero1": ("deepspeed.stage=1",),
        "bf16": ("deepspeed.stage=2", "trainer.precision=bf16"),
        "offload": ("deepspeed.stage=2", "deepspeed.offload_optimizer=true"),
        "zero3": ("deepspeed.stage=3",),
    },
    4: {"zero0": (), "sequence": ("parallel.sequence=2", "deepspeed.stage=2")},
}


@pytest.mark.parametrize("world", VARIANTS)
def test_stages_at_every_zero_stage(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, world: int) -> None:
    """Resumed at a border, 2, and within a stage, 3: bit for bit the uninterrupted run."""
    root = tmp_path_factory.getbasetemp() / "staged-ranks"
    plan: dict[str, list[str]] = {}
    for name, changed in VARIANTS[world].items():
        words = (*STAGED, *changed)
        plan[name] = tiny_overrides(tiny_data, root / name, *words)
        for step in (2, 3):
            start = f"resume={step_folder(root / name / 'checkpoints', step)}"
            plan[f"{name}-{step}"] = tiny_overrides(tiny_data, root / f"{name}-{step}", *words, start)
    root.mkdir(exist_ok=True)
    (root / "plan.json").write_text(json.dumps(plan))
    run_ranks(SCRIPT, world, [root / "plan.json", root / "found.json"], forked=True)
    found = json.loads((root / "found.json").read_text())
    assert {name: found[name] for name in plan} == dict.fromkeys(plan, [None] * world)
    expected = scalars(root / "plain", "train/loss")
    for name in VARIANTS[world]:
        losses = scalars(root / name, "train/loss")
        assert losses == pytest.approx(expected, rel=2e-3 if name == "bf16" else 1e-5), name
        for step in (2, 3):
            resumed = root / f"{name}-{step}"
            assert scalars(resumed, "train/loss") == {at: loss for at, loss in losses.items() if at > step}
            assert_same(step_folder(resumed / "checkpoints", 6), step_folder(root / name / "checkpoints", 6))
