"""Runs of one process: training, log, exact evaluation, and recovery from failures."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from run_helpers import LOSS, checkpoint, heldout_loss, train
from safetensors import SafetensorError
from support.events import read_events, scalars
from support.terminal import terminal
from support.tiny import WORDS
from support.weights import assert_same

from reformer_dist.checkpoint import async_save
from reformer_dist.data import ByteTokenizer, write_dataset
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import UserError
from reformer_dist.process.live_line import live


def test_the_loss_falls(whole: Path) -> None:
    losses = scalars(whole, LOSS)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[1] == pytest.approx(math.log(257), abs=0.1)
    assert losses[6] < losses[1] - 1.0


def test_what_tensorboard_gets(whole: Path) -> None:
    events = read_events(whole)
    lsh = {"lsh/largest_bucket_over_mean", "lsh/full_windows", "lsh/agreement_of_rounds"}
    train_tags = {
        f"train/{name}" for name in ("loss", "bits_per_byte", "grad_norm", "lr", "skipped_steps", "spikes")
    }
    lsh |= {"lsh/coverage", "lsh/coverage_by_chance", "coverage_by_layer/0"}
    eval_tags = {"eval/loss", "eval/bits_per_byte", "eval_by_position/0-63", "reversible/drift", *lsh}
    perf_tags = {"checkpoint/failed_saves", "perf/tokens_per_s", "perf/data_wait", "perf/peak_memory_gib"}
    assert set(events.Tags()["scalars"]) == train_tags | eval_tags | perf_tags | {"data/damaged"}
    assert all(math.isfinite(event.value) for tag in eval_tags for event in events.Scalars(tag))
    assert 0 < scalars(whole, "reversible/drift")[6] < 1e-3
    assert 0 < scalars(whole, "lsh/coverage_by_chance")[6] < scalars(whole, "lsh/coverage")[6] <= 1
    assert scalars(whole, "train/lr")[2] == pytest.approx(0.01)
    assert events.Tags()["tensors"] == ["sample/text_summary"]
    assert events.Tags()["histograms"] == ["lsh/bucket_size_over_mean/0"]
    [sample] = events.Tensors("sample/text_summary")
    assert sample.step == 6
    assert "⟦…⟧" in sample.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("step", [3, 6])
def test_evaluation_is_exact(whole: Path, step: int) -> None:
    loss, bits = heldout_loss(checkpoint(whole, step), seq_len=64)
    assert scalars(whole, "eval/loss")[step] == pytest.approx(loss, rel=1e-6)
    assert scalars(whole, "eval/bits_per_byte")[step] == pytest.approx(bits, rel=1e-6)


def test_evaluation_and_samples_disturb_nothing(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    alone = train(job, tiny_data, tmp_path / "run")
    assert scalars(alone, LOSS) == scalars(whole, LOSS)
    assert_same(checkpoint(alone, 6), checkpoint(whole, 6))


def test_progress_is_told(tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture) -> None:
    train(job, tiny_data, tmp_path / "run", "trainer.max_steps=2", "trainer.eval_every=2")
    announced, first, second, heldout, saved = said.messages
    assert "41,281 parameters | ZeRO stage 0, fp32, 1 rank on cpu | 256 tokens per step in 4 micro-b" in announced
    for line in (first, second):
        for words in (
            "/2 | loss ",
            " | bits per byte ",
            " | ETA ",
            " tokens/s | data wait ",
            " | grad norm ",
            " | lr ",
        ):
            assert words in line
    assert heldout.startswith("step 2 | held-out loss ")
    assert " | held-out bits per byte " in heldout
    assert re.search(r" \| 6 of \d+ rows$", heldout)
    assert saved.endswith("step-00000002")


def test_a_terminal_shows_a_live_line_instead(
    tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    with terminal(70) as screen, live.shown():
        train(job, tiny_data, tmp_path / "run", "trainer.max_steps=2", "trainer.eval_every=2")
    assert max(map(len, screen.frames)) <= 70
    assert any(frame.startswith("2/2 100% |") and "| loss " in frame for frame in screen.frames)
    for phase in ("opening the data", "building the model", "evaluating", "saving"):
        assert any(frame.startswith(phase) for frame in screen.frames), phase
    assert not any("grad norm" in message for message in said.messages)
    assert any("held-out loss" in message for message in said.messages)


def test_a_failed_save_does_not_stop_the_run(
    tiny_data: Path,
    tmp_path: Path,
    job: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    said: pytest.LogCaptureFixture,
) -> None:
    save = async_save.save_file

    def fail_once(*args: object) -> None:
        monkeypatch.setattr(async_save, "save_file", save)
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(async_save, "save_file", fail_once)
    run = train(job, tiny_data, tmp_path / "run")
    assert any("could not be written: " in words and "step-00000003" in words for words in said.messages)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert scalars(run, "checkpoint/failed_saves")[6] == 1


def test_the_last_save_must_succeed(
    tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(async_save, "write_synced", fail)
    with pytest.raises(UserError, match="No space left"):
        train(job, tiny_data, tmp_path / "run", "trainer.max_steps=1")


@pytest.mark.parametrize("key", ["trainer.eval_every", "trainer.sample_every"])
def test_evaluation_and_samples_need_held_out_text(
    tiny_data: Path, tmp_path: Path, job: Runtime, key: str
) -> None:
    text = " ".join(WORDS).encode() * 20
    write_dataset([("doc", text)], tmp_path / "data", ByteTokenizer(), heldout_fraction=0.0)
    with pytest.raises(UserError, match=rf"{re.escape(key)}=0"):
        train(job, tmp_path / "data", tmp_path / "run", f"{key}=1")
