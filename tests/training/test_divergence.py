"""A run that diverges keeps its good checkpoints, and its last message says how to go on from them."""

from __future__ import annotations

import json
import math
import re
import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import LOSS, checkpoint, heldout_loss, interrupted, train
from safetensors.torch import load_file, save_file
from support.events import scalars
from support.launch import run_command
from support.tiny import tiny_config, tiny_overrides
from support.weights import assert_same

from reformer_dist import checkpoints
from reformer_dist.checkpoint import checkpoint_problem, find_checkpoint
from reformer_dist.checkpoint.files import MANIFEST, manifest_entry
from reformer_dist.config import Precision
from reformer_dist.distributed.runtime import Preempted, Runtime
from reformer_dist.engine import StepResult, TrainEngine
from reformer_dist.errors import CheckpointError, TrainingError
from reformer_dist.training.checkpoint_manager import TrainState
from reformer_dist.training.divergence import DivergenceMonitor
from reformer_dist.training.validator import Validator

LONGER = ("trainer.max_steps=20", "trainer.save_every=1", "trainer.max_skipped_steps=3", "optim.accept_jump=true")


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def advice(error: pytest.ExceptionInfo[TrainingError]) -> tuple[list[str], str]:
    """The overrides that the message names, and the message."""
    words = str(error.value)
    return [word for word in shlex.split(words) if re.match(r"(optim\.lr|resume|output_dir)=", word)], words


@pytest.fixture
def skip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a run skip steps, by numbers from 1."""

    def at(*steps: int) -> None:
        step, backward = TrainEngine.step, TrainEngine.backward
        count = [0]

        def poisoned(self: TrainEngine, loss: Any, n_labels: float) -> None:
            backward(self, loss * math.nan if count[0] + 1 in steps else loss, n_labels)

        def counted(self: TrainEngine, lr: float, accepts: Any = None) -> StepResult:
            count[0] += 1
            return step(self, lr, accepts)

        monkeypatch.setattr(TrainEngine, "backward", poisoned)
        monkeypatch.setattr(TrainEngine, "step", counted)

    return at


@pytest.mark.parametrize(
    ("lr", "save_every", "keep"), [("1e3", 1, 1), ("1e9", 2, 1), ("1e20", 1, 2), ("1e30", 1, 1), ("1e45", 1, 1)]
)
def test_good_checkpoints_stay_and_the_advice_works(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, lr: str, save_every: int, keep: int
) -> None:
    """Whatever the rate breaks: weights, moments or the next loss."""
    run = interrupted(whole, tmp_path / "run", 6)
    changed = (*LONGER, f"trainer.save_every={save_every}", f"trainer.keep_checkpoints={keep}")
    with pytest.raises(TrainingError) as error:
        train(job, tiny_data, run, *changed, f"optim.lr={lr}")
    overrides, words = advice(error)
    assert "optim.lr=0.01" in overrides
    named = re.search(r"newest good checkpoint is (\S+);", words)
    assert named is not None
    assert math.isfinite(heldout_loss(Path(named[1]), 64)[0])
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))
    for step in saved_steps(run):
        assert checkpoint_problem(checkpoint(run, step)) is None
    output = next((word.partition("=")[2] for word in overrides if word.startswith("output_dir=")), run)
    train(job, tiny_data, Path(output), *changed, *overrides, "trainer.max_steps=12", "trainer.eval_every=12")
    assert math.isfinite(scalars(Path(output), "eval/loss")[12])
    assert scalars(Path(output), "train/skipped_steps")[12] == 0


def test_a_run_without_a_good_checkpoint_is_told_to_start_again(
    tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    with pytest.raises(TrainingError) as error:
        train(job, tiny_data, tmp_path / "run", *LONGER, "optim.lr=1e20", "trainer.save_every=20")
    overrides, words = advice(error)
    assert overrides == ["optim.lr=1e+19"] and "no good checkpoint" in words


@pytest.mark.slow
def test_the_command_is_printed_as_it_can_be_pasted(whole: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", 6)
    words = tiny_overrides(tiny_data, run, *LONGER, "optim.lr=1e20")
    said = run_command("reformer-train", *words, status=1)
    program, *arguments = shlex.split(said[said.index("reformer-train") :])
    assert "optim.lr=1e20" not in arguments
    run_command(program, *arguments)


def test_a_save_that_is_due_waits_for_the_next_good_step(
    tiny_data: Path, tmp_path: Path, job: Runtime, skip: Callable[..., None], said: pytest.LogCaptureFixture
) -> None:
    skip(3, 4)
    run = train(job, tiny_data, tmp_path / "run")
    assert saved_steps(run) == [5, 6]
    assert scalars(run, "train/skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 2}
    assert math.isnan(scalars(run, LOSS)[3])
    assert sum("step 3 is not saved" in line for line in said.messages) == 1
    train(job, tiny_data, run, "trainer.max_steps=7")
    assert scalars(run, "train/skipped_steps")[7] == 2  # saved


def test_the_last_step_is_not_saved_if_it_was_skipped(
    tiny_data: Path, tmp_path: Path, job: Runtime, skip: Callable[..., None]
) -> None:
    skip(6)
    with pytest.raises(TrainingError, match="step 6") as error:
        train(job, tiny_data, tmp_path / "run")
    assert str(checkpoint(tmp_path / "run", 3)) in str(error.value)
    assert saved_steps(tmp_path / "run") == [3]


def test_a_stop_while_steps_are_skipped_saves_nothing(
    tiny_data: Path, tmp_path: Path, job: Runtime, skip: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopAt4:
        looks = 0

        @property
        def is_set(self) -> bool:
            return run_steps[0] >= 4

    run_steps = [0]
    skip(4)
    step = TrainEngine.step

    def counted(self: TrainEngine, lr: float, accepts: Any = None) -> StepResult:
        run_steps[0] += 1
        return step(self, lr, accepts)

    monkeypatch.setattr(TrainEngine, "step", counted)
    with pytest.raises(Preempted, match=r"step 4 is not saved.* step 3$"):
        train(job, tiny_data, tmp_path / "run", stop=StopAt4())  # type: ignore[arg-type]
    assert saved_steps(tmp_path / "run") == [3]


def test_a_loss_scale_that_adapts_does_not_delay_saves(
    tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 skips steps now and then, whose loss is finite; the scaler alone runs on GPUs only."""

    class Checkpoints:
        """None to be called: a skipped step proves nothing."""

    config = tiny_config(tiny_data, tmp_path)
    config.trainer.precision = Precision.fp16
    monitor = DivergenceMonitor(config, job, Checkpoints(), TrainState(step=3), 5.0)  # type: ignore[arg-type]
    skipped = StepResult(math.nan, was_skipped=True)
    monitor.end_step(torch.tensor(1.0), 1.0, skipped)
    assert not monitor.is_broken
    monitor.end_step(torch.tensor(math.nan), 1.0, skipped)
    assert monitor.is_broken


@pytest.mark.parametrize(("kind", "value"), [("fp32", math.inf), ("exp_avg", -math.inf), ("exp_avg_sq", math.nan)])
def test_numbers_that_are_not_finite_are_damage(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, value: float
) -> None:
    """In checkpoints of older versions, with right checksums."""
    run = interrupted(whole, tmp_path / "run", 3, 6)
    path = checkpoint(run, 6) / "rank-00000.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(f"|{kind}"))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    manifest = json.loads((path.parent / MANIFEST).read_text())
    manifest["files"][path.name] = manifest_entry(path)
    (path.parent / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="1 of 2 checkpoints are damaged"):
        checkpoints.verify(Namespace(run=run))
    said = capsys.readouterr().out
    assert f"{checkpoint(run, 3)}: intact" in said and name in said and "not finite" in said
    assert find_checkpoint(run / "checkpoints")[0] == checkpoint(run, 3)


def test_an_evaluation_that_is_not_finite_is_not_saved(
    tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {3: {"eval/loss": 1.0}, 6: {"eval/loss": math.nan}}
    monkeypatch.setattr(Validator, "evaluate", lambda self, step, seconds: found[step])
    with pytest.raises(TrainingError, match="step 6"):
        train(job, tiny_data, tmp_path / "run", "trainer.eval_every=3")
    assert saved_steps(tmp_path / "run") == [3]


def test_a_loss_worse_than_guessing_warns_stops_and_keeps_what_was_good(
    whole: Path,
    tiny_data: Path,
    tmp_path: Path,
    job: Runtime,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reformer_dist.training.divergence.WARN_AFTER_STEPS", 4)
    run = interrupted(whole, tmp_path / "run", 6)
    worse = ("optim.lr=3", "optim.grad_clip=0", "trainer.max_steps=40", "trainer.save_every=2")
    kept = ("trainer.keep_checkpoints=2", "trainer.log_every=2")
    with pytest.raises(TrainingError, match=r"trainer\.max_diverged_steps=8") as error:
        train(job, tiny_data, run, *worse, *kept, "trainer.max_diverged_steps=8")
    overrides, words = advice(error)
    assert str(checkpoint(run, 6)) in words and "optim.lr=0.01" in overrides
    assert sum("above 5.5" in line and "guessing" in line for line in said.messages) == 1
    assert 6 in saved_steps(run) and len(saved_steps(run)) <= 4
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))
