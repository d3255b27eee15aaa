"""Tasks on several ranks: the losses of one rank, at a ZeRO stage, and with sequences that ranks share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launch import run_ranks
from support.tiny import tiny_overrides
from task_data import write_for, write_pairs

pytestmark = pytest.mark.slow

KINDS = {
    "completion": ["data.seq_len=128"],
    "sequence_to_sequence": ["task.max_source_len=64"],
    "question_answering": ["model.causal=false", "task.stride=8"],
}


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("train/loss", "train/grad_norm")] + [rows[-1]["eval/loss"]]


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("completion", ["parallel.sequence=2"]),
        ("sequence_to_sequence", ["deepspeed.stage=2"]),
        ("sequence_to_sequence", ["parallel.sequence=2"]),
        ("question_answering", ["deepspeed.stage=3"]),
    ],
)
def test_two_ranks_have_the_losses_of_one(kind: str, world: list[str], tmp_path: Path) -> None:
    data = write_for(kind, tmp_path / "data") if kind == "question_answering" else write_pairs(tmp_path / "data")
    common = [f"task.kind={kind}", *KINDS[kind], "model.dropout=0", "trainer.eval_every=6", "trainer.max_steps=6"]
    for n_ranks, name, more in ((1, "one", []), (2, "two", world)):
        overrides = tiny_overrides(data, tmp_path / name, *common, "trainer.micro_batch_size=2", *more)
        run_ranks("reformer_dist.train", n_ranks, overrides)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
