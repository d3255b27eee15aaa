"""Optimizers, parameter groups, averages and kept moments in whole runs; the engine's own are in tests/engine."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from run_helpers import checkpoint, interrupted, losses, train
from support.events import scalars
from support.tiny import tiny_config
from support.weights import assert_same, read_all

from reformer_dist import checkpoints, evaluate, generate
from reformer_dist.checkpoint import CheckpointReader, WeightChoice
from reformer_dist.checkpoint.files import manifest_entry
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import CheckpointError, ConfigError, UserError
from reformer_dist.run.build import build_trainer
from reformer_dist.run.pretrained import load_model

MUON = (
    *("optim.kind=muon", "optim.average=exponential", "optim.average_decay=0.5", "trainer.eval_every=3"),
    *(
        "optim.groups=[{match: embedding.*, frozen: true}]",
        "data.eval_rows=0",
        "trainer.keep_best=eval_average/loss",
    ),
)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, job: Runtime) -> Path:
    """A run of 6 steps; not to be changed."""
    return train(job, tiny_data, tmp_path_factory.mktemp("averaged") / "run", *MUON)


def test_a_resumed_run_is_the_same(averaged: Path, tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    resumed = train(job, tiny_data, interrupted(averaged, tmp_path / "run", 3), *MUON)
    assert_same(checkpoint(resumed, 6), checkpoint(averaged, 6))
    assert losses(resumed) == {step: row for step, row in losses(averaged).items() if step > 3}
    assert "eval_average/bits_per_byte" in losses(averaged)[6]


def test_every_command_uses_the_average(averaged: Path, tmp_path: Path, job: Runtime) -> None:
    loss = scalars(averaged, "eval_average/loss")[6]
    assert loss != pytest.approx(scalars(averaged, "eval/loss")[6], rel=1e-4)
    arguments = evaluate.build_parser().parse_args([str(averaged), "--average"])
    assert f"held-out loss: {loss:.4f} nats per token" in evaluate._report(arguments, job)[1]
    exporting = ["export", str(averaged), str(tmp_path / "exported"), "--average", "--best"]
    arguments = checkpoints.build_parser().parse_args(exporting)
    arguments.action(arguments)
    best = CheckpointReader(averaged / "checkpoints" / "step-00000006").best_step
    assert best is not None
    reader = CheckpointReader(checkpoint(averaged, best), averaged=True)
    exported = load_model(tmp_path / "exported", [], torch.device("cpu")).model
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter.detach().flatten(), reader.read(name, "fp32", 0, parameter.numel()))
    words = [str(averaged), "--average", "--prompt", "the", "--max-new-tokens", "2"]
    generate.run_generation(generate.build_parser().parse_args(words))
    with pytest.raises(CheckpointError, match=r"--average: .* is an export"):
        load_model(tmp_path / "exported", [], torch.device("cpu"), WeightChoice(averaged=True))


def test_the_best_is_listed(averaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = checkpoints.build_parser().parse_args(["ls", str(averaged)])
    arguments.action(arguments)
    best = CheckpointReader(checkpoint(averaged, 6)).best_step
    marked = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" | best")]
    assert [line.split(" | ")[1] for line in marked] == [f"step {best}"]


def test_prune_keeps_the_best(averaged: Path, tmp_path: Path) -> None:
    run = interrupted(averaged, tmp_path / "run", 3, 6)
    for step, best in ((6, 3), (6, 6)):
        path = checkpoint(run, step) / "run.json"
        record = json.loads(path.read_text())
        record["progress"]["best"]["step"] = best
        path.write_text(json.dumps(record))
        manifest = json.loads((path.parent / "manifest.json").read_text())
        manifest["files"]["run.json"] = manifest_entry(path)
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
        arguments = checkpoints.build_parser().parse_args(["prune", str(run), "--keep", "1"])
        arguments.action(arguments)
        assert checkpoint(run, 3).exists() == (best == 3)


def test_another_optimizer_is_refused(averaged: Path, tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    copy = interrupted(averaged, tmp_path / "run", 3)
    with pytest.raises(UserError, match=r"optim\.kind=adafactor: .*state of muon"):
        train(job, tiny_data, copy, "optim.kind=adafactor")
    with pytest.raises(UserError, match=r"embedding\.tokens\.weight: it was frozen"):
        train(job, tiny_data, copy, "optim.kind=muon")


def test_an_average_may_begin_later_and_is_no_longer_there_without_one(
    averaged: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    changed = interrupted(averaged, tmp_path / "run", 3)
    train(job, tiny_data, changed, *MUON, "optim.average=window", "trainer.max_steps=4", "optim.accept_jump=true")
    reader = CheckpointReader(checkpoint(changed, 4))
    assert reader.average is not None
    assert (reader.average.window, reader.average.updates) == (1000, 1)
    plain = (*MUON, "optim.average=none", "trainer.keep_best=null", "optim.accept_jump=true")
    train(job, tiny_data, changed, *plain, "trainer.max_steps=5")
    with pytest.raises(CheckpointError, match=r"--average: .*optim\.average"):
        CheckpointReader(checkpoint(changed, 5), averaged=True)


def test_moments_are_kept_over_init_from_if_asked_for(
    averaged: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    source = checkpoint(averaged, 3)
    words = (*MUON, f"init_from={source}", "trainer.max_steps=1")
    with ExitStack() as resources:
        trainer = build_trainer(
            tiny_config(tiny_data, tmp_path / "kept", *words, "init_moments=true"), job, resources
        )
        for fragment in trainer._engine.fragments():
            for kind, values in fragment.tensors().items():
                saved = "fp32" if kind == "average" else kind  # the average begins with the weights
                assert torch.equal(values, CheckpointReader(source).read_all(fragment.name)[saved])
            assert fragment.adam_step == (0 if fragment.kinds == ("fp32",) else 3)
        trainer.fit()
    assert read_all(checkpoint(tmp_path / "kept", 1))["adam_step"] == 4
    fresh = train(job, tiny_data, tmp_path / "fresh", *words)
    assert read_all(checkpoint(fresh, 1))["adam_step"] == 1


def test_moments_that_do_not_fit_are_refused(
    averaged: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    with pytest.raises(ConfigError, match=r"init_moments=True: needs init_from"):
        tiny_config(tiny_data, tmp_path, "init_moments=true")
    arguments = checkpoints.build_parser().parse_args(["export", str(averaged), str(tmp_path / "exported")])
    arguments.action(arguments)
    for number, (source, word, message) in enumerate(
        (
            (tmp_path / "exported", "optim.kind=muon", "is an export"),
            (averaged, "optim.kind=adamw", r"optim\.kind=adamw: .*state of muon"),
            (averaged, "optim.kind=muon", r"embedding\.tokens\.weight: it was frozen"),
        )
    ):
        words = (f"init_from={source}", "init_moments=true", word)
        with pytest.raises(UserError, match=message):
            train(job, tiny_data, tmp_path / f"run{number}", *words)
