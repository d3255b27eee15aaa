"""Runs with masked documents and packed samples: they resume exactly, and ranks report the metrics of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launch import run_ranks
from support.tiny import tiny_overrides
from task_data import write_pairs
from test_task_runs import train

from reformer_dist.distributed.runtime import Runtime

APART = ("data.mask_documents=true", "data.reset_position_ids=true", "model.next_value_heads=1")
LONG = ("model.axial_shape=[32,32]",)
PACKED = ("task.kind=completion", "data.pack_samples=true", "data.seq_len=128")


def told(run: Path) -> list[float]:
    """Losses and gradient norms of all steps, and the final loss."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("train/loss", "train/grad_norm")] + [rows[-1]["eval/loss"]]


@pytest.mark.parametrize(
    ("stage", "recompute"), [pytest.param(0, "none", marks=pytest.mark.slow), (3, "reversible")]
)
def test_a_run_with_masked_documents_resumes_exactly(
    stage: int, recompute: str, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    # rows that are longer than a document
    longer = ("data.seq_len=1024", "model.axial_shape=[32,32]", "data.batch_size=2", "trainer.eval_every=3")
    given = (*APART, *longer, f"deepspeed.stage={stage}", f"model.recompute={recompute}", "trainer.sample_every=6")
    whole = train(job, "language_model", tiny_data, tmp_path / "whole", *given)
    assert 0 < whole[-1]["reversible/drift"] < 1e-4
    assert any(name.startswith("eval_by_position/") for name in whole[-1])
    cut = tmp_path / "whole/checkpoints/step-00000003"
    resumed = train(job, "language_model", tiny_data, tmp_path / "resumed", f"resume={cut}", *given)
    assert resumed[-1] == whole[-1]


def test_a_run_with_packed_samples_resumes_exactly(tmp_path: Path, job: Runtime) -> None:
    data = write_pairs(tmp_path / "data")
    given = ("data.pack_samples=true", "deepspeed.stage=2", "data.epochs=3", "trainer.max_steps=100")
    whole = train(job, "completion", data, tmp_path / "whole", *given)
    assert 6 < whole[-1]["step"] < 50 * 3 / 4  # fewer rows than samples
    cut = tmp_path / "whole/checkpoints/step-00000003"
    resumed = train(job, "completion", data, tmp_path / "resumed", f"resume={cut}", *given)
    assert resumed[-1] == whole[-1]


def test_stages_of_packed_samples_resume_exactly(tmp_path: Path, job: Runtime) -> None:
    data = write_pairs(tmp_path / "data")
    given = ("data.pack_samples=true", "stages=[{until: 2, data.seq_len: 64}, {data.seq_len: 128}]")
    whole = train(job, "completion", data, tmp_path / "whole", *given, "trainer.save_every=1")
    for step in (1, 2):  # before and at the border
        cut = tmp_path / f"whole/checkpoints/step-{step:08d}"
        resumed = train(job, "completion", data, tmp_path / f"resumed{step}", f"resume={cut}", *given)
        assert resumed[-1] == whole[-1]


@pytest.mark.slow
@pytest.mark.jobs
@pytest.mark.parametrize(
    ("rows", "n_ranks", "world"),
    [
        # no number of ranks divides the length of these rows
        (
            ["data.seq_len=1021", "model.axial_shape=[32,32]", *APART],
            4,
            ["parallel.heads=2", "parallel.sequence=4"],
        ),
        (PACKED, 2, ["parallel.heads=1", "parallel.sequence=2", "deepspeed.stage=3"]),
    ],
    ids=["documents", "samples"],
)
def test_ranks_report_the_metrics_of_one(
    rows: list[str], n_ranks: int, world: list[str], tmp_path: Path, tiny_data: Path
) -> None:
    data = tiny_data if rows is not PACKED else write_pairs(tmp_path / "data")
    common = [*rows, "model.dropout=0", "trainer.eval_every=2", "trainer.max_steps=2", "model.n_heads=4"]
    for ranks, name, more in ((1, "one", []), (n_ranks, "several", world)):
        run_ranks("reformer_dist.train", ranks, tiny_overrides(data, tmp_path / name, *common, *more))
    assert told(tmp_path / "several") == pytest.approx(told(tmp_path / "one"), rel=2e-4)
