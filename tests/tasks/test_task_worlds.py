"""Tasks on several ranks have the losses of one rank, at ZeRO stages and with sequence parallelism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launch import run_ranks
from support.tiny import tiny_overrides
from task_data import write_for, write_pairs

pytestmark = [pytest.mark.slow, pytest.mark.jobs]

KINDS = {
    "completion": ["data.seq_len=128"],
    "sequence_to_sequence": ["task.max_source_len=64"],
    "sequence_classification": ["model.causal=false"],
    "question_answering": ["model.causal=false", "task.stride=8"],
}


def told(run: Path) -> list[float]:
    """Losses and gradient norms of all steps, and the final loss and accuracy."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_steps = [row[name] for row in rows for name in ("train/loss", "train/grad_norm")]
    return [*of_steps, rows[-1]["eval/loss"], rows[-1]["eval/accuracy"]]


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("completion", ["parallel.sequence=2"]),
        ("sequence_to_sequence", ["deepspeed.stage=2"]),
        ("sequence_to_sequence", ["parallel.sequence=2"]),
        ("question_answering", ["deepspeed.stage=3"]),
        ("question_answering", ["parallel.sequence=2"]),
        ("sequence_classification", ["parallel.sequence=2", "deepspeed.stage=2"]),
    ],
)
def test_two_ranks_report_the_metrics_of_one(kind: str, world: list[str], tmp_path: Path) -> None:
    of_pairs = kind in ("completion", "sequence_to_sequence")
    data = write_pairs(tmp_path / "data") if of_pairs else write_for(kind, tmp_path / "data")
    common = [f"task.kind={kind}", *KINDS[kind], "model.dropout=0", "trainer.eval_every=6", "trainer.max_steps=6"]
    for n_ranks, name, more in ((1, "one", []), (2, "two", world)):
        overrides = tiny_overrides(data, tmp_path / name, *common, "trainer.micro_batch_size=2", *more)
        run_ranks("reformer_dist.train", n_ranks, overrides)
    assert told(tmp_path / "two") == pytest.approx(told(tmp_path / "one"), rel=2e-4)


def test_ranks_that_share_rows_report_the_metrics_of_one(tmp_path: Path) -> None:
    """The loss is computed on slices, exact match and F1 on each rank's whole questions."""
    data = write_for("question_answering", tmp_path / "data")
    common = ["task.kind=question_answering", *KINDS["question_answering"], "trainer.max_steps=1"]
    run_ranks("reformer_dist.train", 1, tiny_overrides(data, tmp_path / "run", *common))
    told = [
        run_ranks("reformer_dist.evaluate", n_ranks, [tmp_path / "run", f"parallel.sequence={n_ranks}"])
        for n_ranks in (1, 2)
    ]
    one, two = ([line for line in said.splitlines() if ": " in line and "|" not in line] for said in told)
    assert one == two and any(line.startswith("exact match: ") for line in one)
