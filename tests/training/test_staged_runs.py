"""Staged runs: rows, micro-batches, buckets and windows that change, exact over resumes in any stage."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from run_helpers import STAGED, checkpoint, data_state, interrupted, losses, train
from support.tiny import tiny_config
from support.weights import assert_same

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.checkpoint.export import saved_model_config, write_export
from reformer_dist.config.stages import check_ranks
from reformer_dist.data import Corpus
from reformer_dist.distributed.runtime import Preempted, Runtime
from reformer_dist.errors import UserError
from reformer_dist.run.pretrained import load_model
from reformer_dist.training.validator import Validator

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# the last with 3 micro-batches, which do not divide those of the steps before
OFTEN = (
    STAGED[0].replace("data.batch_size: 2", "data.batch_size: 3"),
    *STAGED[1:],
    "trainer.max_steps=7",
    "trainer.save_every=1",
    "trainer.eval_every=1",
    "deepspeed.stage=2",
)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, job: Runtime) -> Path:
    return train(job, tiny_data, tmp_path_factory.mktemp("staged") / "run", *OFTEN)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_run_resumed_in_any_stage_is_the_uninterrupted_one(
    staged: Path, tiny_data: Path, tmp_path: Path, job: Runtime, step: int
) -> None:
    """Also at a border, 2 and 4: weights, moments, rows, losses and evaluations, bit for bit."""
    run = train(job, tiny_data, interrupted(staged, tmp_path / "run", step), *OFTEN)
    assert_same(checkpoint(run, 7), checkpoint(staged, 7))
    assert data_state(checkpoint(run, 7)) == data_state(checkpoint(staged, 7))
    assert losses(run) == {at: row for at, row in losses(staged).items() if at > step}


def test_an_evaluation_that_was_due_at_a_border_is_that_of_the_stage_before(
    staged: Path, tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped after step 2, while it evaluates, and saved."""
    evaluate = Validator.evaluate

    def stopped(self: Validator, step: int, seconds: float) -> dict[str, float]:
        if step == 2:
            raise Preempted("stopped by a signal")
        return evaluate(self, step, seconds)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="saved step 2"):
        patch.setattr(Validator, "evaluate", stopped)
        train(job, tiny_data, tmp_path, *OFTEN)
    train(job, tiny_data, tmp_path, *OFTEN)
    assert losses(tmp_path) == losses(staged)
    assert_same(checkpoint(tmp_path, 7), checkpoint(staged, 7))


def test_each_stage_has_its_rows_and_no_token_is_read_twice(staged: Path) -> None:
    rows = {
        step: (
            len(state["streams"]),
            state["settings"]["seq_len"],
            {value[0] for value in state["streams"].values()},
        )
        for step, state in ((step, data_state(checkpoint(staged, step))) for step in range(1, 8))
    }
    assert rows[2] == (8, 32, {64})
    assert rows[4] == (4, 64, {64 + 2 * 64})
    assert rows[7] == (3, 128, {64 + 2 * 64 + 3 * 128})
    n_units = data_state(checkpoint(staged, 7))["lanes"][0][1]
    [[position, first_pass, [left]]] = data_state(checkpoint(staged, 7))["cuts"]
    assert (position, first_pass) == (192, 0)
    assert n_units - sum(end - first for first, end in left) == 4 * 256


def test_the_order_is_replayed_through_the_stages(
    staged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, words in ((7, ("--hash",)), (4, ("--hash",)), (6, ())):
        arguments = ["inspect_shards.py", str(staged), "--order", str(step), *words]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(TOOLS / "inspect_shards.py"), run_name="__main__")
        assert ("the hash matches" in capsys.readouterr().out) == bool(words)


def test_models_are_those_of_their_stage(staged: Path, tmp_path: Path) -> None:
    """Loaded, fine-tuned from, and exported; overrides come last."""
    for step, n_buckets, n_hashes, base in ((1, 2, 4, 1e4), (2, 2, 4, 1e4), (3, 4, 2, 1e4), (7, 4, 4, 500.0)):
        folder = checkpoint(staged, step)
        for source in (folder, tmp_path / str(step)):
            if source != folder:
                write_export(CheckpointReader(folder), source)
            loaded = load_model(source, ["model.n_hashes=3"], torch.device("cpu"))
            model = loaded.model.config
            assert (model.n_buckets, model.n_hashes, model.rotary_base) == (n_buckets, 3, base)
            assert saved_model_config(str(source))["n_hashes"] == n_hashes
    assert load_model(checkpoint(staged, 7), [], torch.device("cpu")).config.data.seq_len == 128


def test_epochs_end_after_every_token_in_any_stages(tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    stages = "stages=[{until: 3, data.seq_len: 128, data.batch_size: 8}, {data.seq_len: 512, data.batch_size: 5}]"
    epoch = (stages, "data.epochs=1", "model.position=rotary", "trainer.max_steps=1000", "trainer.save_every=0")
    run = train(job, tiny_data, tmp_path, *epoch, "model.n_layers=1")
    n_tokens = Corpus.open([tiny_data]).total("tokens", "train")
    last = 3 + math.ceil(math.ceil((n_tokens - 3 * 1024) / 5) / 512)
    assert max(losses(run)) == last


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("data.batch_size: 8000, data.seq_len: 2048, trainer.micro_batch_size: null", r"batch_size=8000 .*GiB"),
        ("data.batch_size: 30000", r"\b30000 rows"),
    ],
)
def test_a_stage_that_can_not_run_is_refused_at_the_start(
    tiny_data: Path, tmp_path: Path, job: Runtime, values: str, message: str
) -> None:
    """For the memory that it needs, or the data."""
    changed = ("model.position=rotary", f"stages=[{{until: 3}}, {{{values}}}]")
    with pytest.raises(UserError, match=message):
        train(job, tiny_data, tmp_path / "run", *changed)
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_is_that_of_the_last_stage(
    staged: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    """Losses of rows of 128 tokens are not compared with those of rows of 32."""
    best = ("trainer.keep_best=eval/loss", "trainer.best_mode=max", "trainer.patience=4")
    run = train(job, tiny_data, tmp_path / "run", *OFTEN, *best)
    found = CheckpointReader(checkpoint(run, 7)).best_step
    losses_of_last = {step: row["eval/loss"] for step, row in losses(staged).items() if step > 4}
    assert found == max(losses_of_last, key=lambda step: losses_of_last[step])


def test_stages_may_change_on_the_way(
    staged: Path, tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    """A run without stages is taken up with some, and a staged one without."""
    run = train(job, tiny_data, interrupted(staged, tmp_path / "run", 3), *OFTEN, "stages=[]")
    assert data_state(checkpoint(run, 7))["settings"]["batch_size"] == 4
    assert any(line.startswith("  changed since the checkpoint: stages: ") for line in said.messages)


def test_ranks_that_do_not_divide_a_stage_are_refused_at_the_start(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path, *OFTEN)
    check_ranks(config, 1)
    with pytest.raises(UserError, match=r"^stages\[2\]: data\.batch_size=3: .*\b2 data-parallel ranks"):
        check_ranks(config, 2)
