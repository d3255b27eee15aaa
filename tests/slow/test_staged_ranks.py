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
    2: {
        "zero1": ("deepspeed.stage=1",),
        "bf16": ("deepspeed.stage=2", "trainer.precision=bf16"),
        "offload": ("deepspeed.stage=2", "deepspeed.offload_optimizer=true"),
        "zero3": ("deepspeed.stage=3",),
        "muon": ("deepspeed.stage=3", "optim.kind=muon", "optim.average=exponential"),
    },
    4: {"zero0": (), "sequence": ("parallel.sequence=2", "deepspeed.stage=2")},
}
TOLERANCES = {"bf16": 2e-3, "muon": None}  # None: of another optimizer


def train(root: Path, world: int, plan: dict[str, list[str]]) -> None:
    (root / "plan.json").write_text(json.dumps(plan))
    run_ranks(SCRIPT, world, [root / "plan.json", root / "found.json"], forked=True)
    found = json.loads((root / "found.json").read_text())
    assert {name: found[name] for name in plan} == dict.fromkeys(plan, [None] * world)


@pytest.fixture(scope="module")
def expected(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one rank."""
    root = tmp_path_factory.mktemp("one")
    train(root, 1, {"plain": tiny_overrides(tiny_data, root / "plain", *STAGED)})
    return scalars(root / "plain", "train/loss")


@pytest.mark.parametrize("world", VARIANTS)
def test_stages_at_every_zero_stage(
    expected: dict[int, float], tiny_data: Path, tmp_path: Path, world: int
) -> None:
    """Resumed at a border, 2, and within a stage, 3: bit for bit the uninterrupted run."""
    plan: dict[str, list[str]] = {}
    for name, changed in VARIANTS[world].items():
        words = (*STAGED, *changed)
        plan[name] = tiny_overrides(tiny_data, tmp_path / name, *words)
        for step in (2, 3):
            start = f"resume={step_folder(tmp_path / name / 'checkpoints', step)}"
            plan[f"{name}-{step}"] = tiny_overrides(tiny_data, tmp_path / f"{name}-{step}", *words, start)
    train(tmp_path, world, plan)
    for name in VARIANTS[world]:
        losses = scalars(tmp_path / name, "train/loss")
        if (tolerance := TOLERANCES.get(name, 1e-5)) is not None:
            assert losses == pytest.approx(expected, rel=tolerance), name
        for step in (2, 3):
            resumed = tmp_path / f"{name}-{step}"
            assert scalars(resumed, "train/loss") == {at: loss for at, loss in losses.items() if at > step}
            assert_same(step_folder(resumed / "checkpoints", 6), step_folder(tmp_path / name / "checkpoints", 6))
