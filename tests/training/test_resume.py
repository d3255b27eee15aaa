"""Runs resume exactly where they stopped, from the right checkpoint, or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from run_helpers import LOSS, checkpoint, damage, data_state, interrupted, losses, train
from support.events import scalars
from support.tiny import tiny_overrides
from support.weights import assert_same

from reformer_dist.checkpoint import CheckpointReader, find_checkpoint
from reformer_dist.checkpoint.files import step_of
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import UserError
from reformer_dist.run.build import build_trainer
from reformer_dist.run.compose import compose_run
from reformer_dist.training.checkpoint_manager import CheckpointManager, TrainState


def test_resume_is_bitwise(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    run = train(job, tiny_data, interrupted(whole, tmp_path / "run", 3))
    assert scalars(run, LOSS) == {step: loss for step, loss in scalars(whole, LOSS).items() if step > 3}
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))
    assert f"resuming from {checkpoint(run, 3)} at step 3" in said.messages
    assert "  changed since the checkpoint: trainer.eval_every: 3 -> 0" in said.messages
    train(job, tiny_data, run)
    assert "nothing to train" in said.messages[-1]


def test_bf16_resumes_bitwise(tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    changed = ("trainer.precision=bf16", "deepspeed.stage=2")
    whole = train(job, tiny_data, tmp_path / "whole", *changed)
    run = train(job, tiny_data, interrupted(whole, tmp_path / "run", 3), *changed)
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))


def test_the_first_rows_are_read_while_the_weights_are(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = CheckpointManager.restore
    readers = []

    def listed(self: CheckpointManager, reader: CheckpointReader) -> TrainState:
        readers.extend(thread for thread in threading.enumerate() if thread.name == "train-loader")
        return restore(self, reader)

    monkeypatch.setattr(CheckpointManager, "restore", listed)
    train(job, tiny_data, interrupted(whole, tmp_path / "run", 3))
    assert readers


@pytest.mark.jobs
def test_kill_9_and_start_again(
    tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    """A process is killed at some step after the fourth; the next resumes without a trace of it."""
    run, constant = tmp_path / "run", "optim.schedule=constant"
    endless = tiny_overrides(tiny_data, run, constant, "trainer.max_steps=1000000")
    command = [sys.executable, "-u", "-m", "reformer_dist.train", *endless]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # the number of threads changes the order of summation
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " 4/1000000 | loss" in line:
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait(60) == -signal.SIGKILL
    found, complaints = find_checkpoint(run / "checkpoints")
    assert not complaints
    step = step_of(found) if found is not None else 0  # saved in the background: the kill may have come first
    rest = (constant, f"trainer.max_steps={step + 6}")
    train(job, tiny_data, run, *rest)
    assert (f"resuming from {found} at step {step}" in said.messages) == (found is not None)
    uncut = train(job, tiny_data, tmp_path / "uncut", *rest)
    assert_same(checkpoint(run, step + 6), checkpoint(uncut, step + 6))
    assert scalars(run, LOSS) == scalars(uncut, LOSS)  # each step once


def test_a_kill_between_the_metrics_and_the_checkpoint_of_a_step(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics are synced before a checkpoint begins; those after the last one, and torn lines, are removed."""
    start_save = CheckpointManager.start_save

    def killed_at_step_6(self: CheckpointManager, state: TrainState, data_state: dict[str, Any]) -> None:
        if state.step == 6:
            raise KeyboardInterrupt
        start_save(self, state, data_state)

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointManager, "start_save", killed_at_step_6)
        train(job, tiny_data, run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert list(scalars(run, LOSS)) == list(losses(run)) == [1, 2, 3, 4, 5, 6]
    [events] = (run / "tensorboard").iterdir()
    for path in (run / "metrics.jsonl", events):
        content = path.read_bytes()
        path.write_bytes(content + content[-300:-9])  # killed in the middle of a record
    train(job, tiny_data, run)
    assert scalars(run, LOSS) == scalars(whole, LOSS)
    assert [row[LOSS] for row in losses(run).values()] == [row[LOSS] for row in losses(whole).values()]
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))


def test_resume_falls_back_behind_a_damaged_checkpoint(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    run = interrupted(whole, tmp_path / "run", 3, 6)
    damage(checkpoint(run, 6))
    train(job, tiny_data, run)
    assert any(str(checkpoint(run, 6)) in line and "rank-00000.safetensors" in line for line in said.messages)
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))


def test_resume_where_all_are_damaged(whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    run = interrupted(whole, tmp_path / "run", 3)
    damage(checkpoint(run, 3))
    with pytest.raises(UserError, match=rf"{run}.*: .*no checkpoint"):
        train(job, tiny_data, run)
    with pytest.raises(UserError, match=rf"resume=never: .*{run}"):
        train(job, tiny_data, run, "resume=never")


def test_resume_never_refuses_to_mix_runs(whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    run = interrupted(whole, tmp_path / "run", 3)
    (run / "config.yaml").write_text("as it was")
    with pytest.raises(UserError, match=rf"resume=never: .*{run}"):
        train(job, tiny_data, run, "resume=never")
    assert (run / "config.yaml").read_text() == "as it was"
    fresh = train(job, tiny_data, tmp_path / "fresh", "resume=never")
    assert_same(checkpoint(fresh, 6), checkpoint(whole, 6))


def test_resume_from_a_path(whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    run = train(job, tiny_data, tmp_path / "run", f"resume={checkpoint(whole, 3)}")
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{path}: .*checkpoint"):
            train(job, tiny_data, tmp_path / "other", f"resume={path}")


def test_a_run_that_began_at_a_path_goes_on_from_its_own_checkpoints(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    """A requeued command names the path each time, even after it has been removed."""
    source = Path(shutil.copytree(whole, tmp_path / "source"))
    run, resume = tmp_path / "run", f"resume={checkpoint(source, 3)}"
    train(job, tiny_data, run, resume, "trainer.max_steps=5")
    for gone in (False, True):
        if gone:
            shutil.rmtree(source)
            shutil.rmtree(checkpoint(run, 6))
        said.clear()
        train(job, tiny_data, run, resume)
        assert f"resuming from {checkpoint(run, 5)} at step 5" in said.messages
    with pytest.raises(UserError, match=r"resume=.*step-00000003: .*step-00000006 "):
        train(job, tiny_data, run, f"resume={checkpoint(whole, 3)}")


def test_going_back_in_the_same_directory_is_refused(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    run = interrupted(whole, tmp_path / "run", 3, 6)
    with pytest.raises(UserError, match=r"output_dir, or resume=auto"):
        train(job, tiny_data, run, f"resume={checkpoint(run, 3)}")
    train(job, tiny_data, run, f"resume={checkpoint(run, 6)}")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("model.ff_mult=2", r"\bmodel\b(.|\n)*feed_forward.* in the checkpoint"),
        ("trainer.seed=1", "seed"),
    ],
)
def test_resume_of_another_run_is_refused(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, changed: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        train(job, tiny_data, interrupted(whole, tmp_path / "run", 3), changed)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
@pytest.mark.parametrize("target", ["/proc/self", "file"])
def test_a_directory_that_can_not_be_written_is_found_before_training(
    tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture, name: str, target: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target if target.startswith("/") else tmp_path / target)
    with pytest.raises(UserError, match=rf"^output_dir={tmp_path}/run: {tmp_path}/run/{name} can't be written"):
        train(job, tiny_data, tmp_path / "run")
    assert not any(" | loss" in line for line in said.messages)


def test_another_model_is_refused_with_its_keys(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    run = interrupted(whole, tmp_path / "run", 3)
    with pytest.raises(UserError, match=r"(?s)different model.*output_dir.*\n  model\.dim: 32 -> 64"):
        train(job, tiny_data, run, "model.dim=64", "model.axial_dims=[16,48]")


def test_a_run_is_taken_up_at_another_length(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    """In the middle and after its end; each token is read once (tests/data/test_recut.py)."""
    longer = ("data.seq_len=128", "data.batch_size=2", "trainer.micro_batch_size=2")
    run = train(job, tiny_data, interrupted(whole, tmp_path / "run", 3), *longer)
    state = data_state(checkpoint(run, 6))
    assert state["origin"] == [3, 0] and state["settings"]["seq_len"] == 128
    assert [value[0] for value in state["streams"].values()] == [3 * 64 + 3 * 128] * 2
    assert any(line.startswith("rows of a step: 4 of 64 tokens -> 2 of 128 tokens") for line in said.messages)
    again = train(job, tiny_data, run, "trainer.max_steps=7", "optim.accept_jump=true")
    state = data_state(checkpoint(again, 7))
    assert [value[0] for value in state["streams"].values()] == [3 * 64 + 3 * 128 + 64] * 4


@pytest.mark.parametrize(
    ("before", "after", "rates"),
    [
        (("optim.schedule=constant",), ("optim.schedule=linear",), ("0.01", "0.0064")),
        ((), ("optim.accept_jump=true",), ("0.00232", "0.00689")),
        (("optim.schedule=constant",), ("optim.schedule=constant",), None),
        ((), ("trainer.max_steps=6",), None),
    ],
)
def test_a_rate_that_jumps_is_told(
    tiny_data: Path,
    tmp_path: Path,
    job: Runtime,
    said: pytest.LogCaptureFixture,
    before: tuple[str, ...],
    after: tuple[str, ...],
    rates: tuple[str, str] | None,
) -> None:
    train(job, tiny_data, tmp_path, *before)
    train(job, tiny_data, tmp_path, "trainer.max_steps=12", *after)
    told = [line for line in said.messages if line.startswith("the learning rate goes from")]
    assert len(told) == (rates is not None)
    if rates is not None:
        assert f"from {rates[0]} at step 6 to {rates[1]} at step 7" in told[0]
        assert "trainer.max_steps: 6 -> 12" in told[0]


def test_a_longer_schedule_goes_on_only_as_the_message_says(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    """Each way that a refused run is offered works: at the last rate, with a warm-up, or with a jump."""
    longer, refusal = "trainer.max_steps=9", r"^trainer\.max_steps=9: .*0\.00232 at step 6 .*max_steps: 6 -> 9"
    with pytest.raises(UserError, match=refusal) as refused:
        train(job, tiny_data, interrupted(whole, tmp_path / "run", 6), longer)
    ways = [way.partition(": ")[2].split() for way in str(refused.value).split("; ") if way.startswith("to ")]
    assert [way[0].partition("=")[0] for way in ways] == ["optim.schedule", "optim.restarts", "optim.accept_jump"]
    for number, (way, rates) in enumerate(
        zip(ways, ([0.00232] * 3, [0.0055, 0.01, 0.01], [0.0045, 0.00269, 0.00145]), strict=True)
    ):
        run = train(job, tiny_data, interrupted(whole, tmp_path / f"run{number}", 6), longer, *way)
        assert [row["train/lr"] for row in losses(run).values()] == pytest.approx(rates, rel=1e-2)


def test_branches_of_a_stable_run_decay_from_its_checkpoints(
    tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    stable = ("optim.schedule=wsd", "optim.decay=one_minus_sqrt")
    trunk = train(job, tiny_data, tmp_path / "trunk", *stable)
    train(job, tiny_data, trunk, *stable, "trainer.max_steps=7")  # longer, at the same rate
    branch = (*stable, "optim.decay_from=3", "trainer.max_steps=5", f"resume={checkpoint(trunk, 3)}")
    run = train(job, tiny_data, tmp_path / "branch", *branch)
    assert [row["train/lr"] for row in losses(run).values()] == pytest.approx(
        [0.01, 0.001 + 0.009 * (1 - 0.5**0.5)]
    )
    assert not any("the learning rate goes" in line for line in said.messages)
    with pytest.raises(UserError, match=r"(?s)^trainer\.max_steps=9: .*from before the decay"):
        train(job, tiny_data, run, *branch[:-2], "trainer.max_steps=9")


def test_a_run_with_checkpoints_outlives_the_source_of_its_weights(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    source, run = shutil.copytree(whole, tmp_path / "source"), tmp_path / "run"
    words = tiny_overrides(tiny_data, run, f"init_from={source}")

    def run_command_line() -> None:
        with ExitStack() as resources:
            build_trainer(compose_run(words), job, resources).fit()

    run_command_line()
    shutil.rmtree(source)
    shutil.rmtree(checkpoint(run, 6))
    run_command_line()
    assert checkpoint(run, 6).is_dir()
    shutil.rmtree(run)
    with pytest.raises(UserError, match=str(source)):
        run_command_line()
