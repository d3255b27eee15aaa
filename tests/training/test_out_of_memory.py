"""A rank whose memory runs out says which keys would help, and leaves the plan and what was in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import train
from support.tiny import tiny_config

from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.errors import OutOfMemory
from reformer_dist.run.out_of_memory import reported

ROWS = ("trainer.micro_batch_size=4", "model.recompute=none")


def too_much() -> None:
    """An error of PyTorch's allocator, as a run would get it."""
    torch.empty(2**55)


def no_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize("run_out", [too_much, no_gpu_memory, no_memory])
def test_a_report_with_the_plan_and_what_would_help(
    run_out: Callable[[], None], tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(self: TrainEngine, *arguments: Any) -> None:
        run_out()

    monkeypatch.setattr(TrainEngine, "backward", backward)
    output = tmp_path / "run"
    config = tiny_config(tiny_data, output, *ROWS)
    message = r"^rank 0: out of memory: .*trainer\.micro_batch_size=1: "
    with pytest.raises(OutOfMemory, match=message) as raised, reported(config, job):
        train(job, tiny_data, output, *ROWS)
    report = (output / "out_of_memory/rank-00000.txt").read_text()
    assert str(output / "out_of_memory/rank-00000.txt") in str(raised.value)
    for words in ("planned peak of a rank", "model.recompute=reversible: ", "data.seq_len=32: ", "in backward"):
        assert words in report
    assert report.index("data.seq_len=32: ") > report.index("model.recompute=reversible: ")
    assert "x float32[257, 32] on cpu" in report  # the token embedding, among the largest tensors


def test_other_errors_are_left_alone(tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    config = tiny_config(tiny_data, tmp_path / "run")
    with pytest.raises(RuntimeError, match="odd shape"), reported(config, job):
        raise RuntimeError("odd shape")
    assert not (tmp_path / "run").exists()


def test_a_report_without_a_plan(tmp_path: Path, job: Runtime) -> None:
    config = tiny_config(tmp_path / "no data", tmp_path / "run")
    with pytest.raises(OutOfMemory, match="--dry-run"), reported(config, job):
        raise MemoryError
    assert "planned peak" not in (tmp_path / "run/out_of_memory/rank-00000.txt").read_text()
