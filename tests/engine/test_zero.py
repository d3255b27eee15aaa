"""Every ZeRO stage trains the same model on any number of ranks, compared with PyTorch's optimizers alone.

Two jobs do the work (zero_cases.py); the tests look at what they left behind.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from support.launch import run_ranks
from support.plain_training import train_plainly
from support.weights import assert_same, read_all
from torch import Tensor
from zero_setup import (
    LEARNING_RATES,
    PROVED,
    READ,
    RESUMED,
    SLOW,
    SLOW_READ,
    STEPS,
    TRAINED,
    VALID,
    Case,
    Outcome,
    micro_batches,
    read_name,
    rows,
)

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.checkpoint.files import step_folder

pytestmark = pytest.mark.jobs

WORLDS = (1, 2)
ALL = [(world, case) for world in WORLDS for case in (*PROVED[world], *TRAINED[world], *RESUMED[world])]
FP32 = [(world, case) for world, case in ALL if case.precision == "fp32"]
BF16 = [(world, case) for world, case in ALL if case.precision == "bf16"]
RESUMES = [(world, case) for world in WORLDS for case in (*PROVED[world], *RESUMED[world])]
AVERAGED = [(world, case) for world, case in FP32 if case.average != "none"]
PROOFS = [(world, case) for world in WORLDS for case in PROVED[world]]
READS = [(world, *pair) for world in WORLDS for pair in READ[world]]


class Job:
    """Results of one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        record = json.loads((folder / "results.json").read_text())
        self.outcomes = {name: Outcome(**outcome) for name, outcome in record.items()}

    def saved(self, name: str, step: int = STEPS) -> Path:
        return step_folder(self.folder / name, step)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Job]:
    """Jobs by number of processes. No compiler is available, and none is needed."""
    root = tmp_path_factory.mktemp("zero")
    script = Path(__file__).with_name("zero_cases.py")
    built = root / "built"
    env = {"TORCH_EXTENSIONS_DIR": str(built), "CC": "/bin/false", "CXX": "/bin/false"}
    env["PATH"] = str(Path(sys.executable).parent)
    folders = {world: root / f"world{world}" for world in WORLDS}
    for folder in (built, *folders.values()):
        folder.mkdir()
    run_ranks(script, 2, [folders[2]], env=env, timeout=560)
    run_ranks(script, 1, [folders[1], folders[2]], env=env, timeout=560)
    assert not list(built.iterdir()), "something was compiled"
    return {world: Job(folder) for world, folder in folders.items()}


@cache
def without_deepspeed(case: Case, world: int) -> tuple[Outcome, list[dict[str, Tensor]]]:
    """Losses, norms, and weights after each step, of one process without ZeRO and recomputation."""
    return _without_deepspeed(replace(case, stage=0, offload=False, precision="fp32", recompute="none"), world)


@cache
def _without_deepspeed(case: Case, world: int) -> tuple[Outcome, list[dict[str, Tensor]]]:
    model = case.model()
    weights: list[dict[str, Tensor]] = []

    def sums(step: int) -> Iterator[Tensor]:
        return (model(inputs, labels, **seeds) for inputs, labels, seeds in _all_micro_batches(step, world))

    def record() -> None:
        weights.append({name: p.detach().flatten().clone() for name, p in model.named_parameters()})

    record()
    losses, norms = train_plainly(
        model, case.config().optim, LEARNING_RATES[:STEPS], lambda step: (VALID, sums(step)), record
    )
    return Outcome(losses, norms), weights


def _all_micro_batches(step: int, world: int) -> Iterator[tuple[Tensor, Tensor, dict[str, int]]]:
    for rank in range(world):
        yield from micro_batches(step, rank, world)


def label(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


def by_case(cases: list[tuple[int, Case]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("world", "case"), cases, ids=label)


@by_case(FP32)
def test_training_is_that_of_plain_pytorch(jobs: dict[int, Job], world: int, case: Case) -> None:
    found = jobs[world].outcomes[case.name]
    right, weights = without_deepspeed(case, world)
    assert found.losses == pytest.approx(right.losses, abs=1e-6)
    assert found.norms == pytest.approx(right.norms, rel=1e-5)
    assert max(right.norms) > case.config().optim.grad_clip > min(right.norms)  # some steps are clipped, some not
    saved = read_all(jobs[world].saved(case.name), ("fp32",))
    assert saved.pop("adam_step") == STEPS
    check_weights(saved, weights[-1])


def check_weights(saved: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert saved.keys() == {f"{name}|fp32" for name in right}
    differences = {name: (saved[f"{name}|fp32"] - right[name]).abs().max().item() for name in right}
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] <= 2e-6, (worst, differences[worst])


@by_case(AVERAGED)
def test_averages_are_those_of_the_weights_after_each_step(jobs: dict[int, Job], world: int, case: Case) -> None:
    _, (start, *weights) = without_deepspeed(case, world)
    right = {}
    for name in start:
        steps = [after[name] for after in weights]
        if case.average == "window":  # blocks of 2 steps: the last two of them, both complete
            right[name] = torch.stack(steps[:4]).mean(dim=0)
            continue
        right[name] = start[name].clone()
        for step, values in enumerate(steps):
            share = min(case.config().optim.average_decay, (1 + step) / (10 + step))
            right[name] = share * right[name] + (1 - share) * values
    reader = CheckpointReader(jobs[world].saved(case.name), averaged=True)
    check_weights(
        {f"{name}|fp32": reader.read(name, "fp32", 0, len(values)) for name, values in right.items()}, right
    )
    model = case.model()
    reader.load_weights(model)
    row = rows(99)
    heldout = model.eval()(row[:, :-1], row[:, 1:]).item()
    found = jobs[world].outcomes[case.name]
    assert found.heldout_of_average[str(STEPS)] == pytest.approx(heldout, rel=1e-6)
    assert found.heldout_of_average[str(STEPS)] != pytest.approx(found.heldout[str(STEPS)], rel=1e-4)


@pytest.mark.parametrize(
    ("world", "case"), [pair for pair in ALL if pair[1].groups], ids=lambda value: label(value)
)
def test_frozen_parameters_keep_their_exact_values(jobs: dict[int, Job], world: int, case: Case) -> None:
    """Also in bf16, where the model has them rounded."""
    reader = CheckpointReader(jobs[world].saved(case.name))
    frozen = {name: p for name, p in case.model().named_parameters() if reader.read_all(name).keys() == {"fp32"}}
    assert len(frozen) > 10
    assert all(name.startswith(("embedding.", "stack.blocks.0.")) for name in frozen)
    for name, p in frozen.items():
        assert torch.equal(reader.read(name, "fp32", 0, p.numel()), p.detach().flatten())


@by_case(FP32)
def test_decoding_is_the_forward(jobs: dict[int, Job], world: int, case: Case) -> None:
    """Also where stage 3 gathers the weights for every token."""
    assert jobs[world].outcomes[case.name].decoding_error <= 1e-5


@by_case(BF16)
def test_bf16_is_close(jobs: dict[int, Job], world: int, case: Case) -> None:
    found, right = jobs[world].outcomes[case.name], without_deepspeed(case, world)[0]
    assert found.losses == pytest.approx(right.losses, abs=3e-3)
    assert found.norms == pytest.approx(right.norms, rel=0.02)
    assert found.losses != pytest.approx(right.losses, abs=1e-6)  # it is really bf16


@by_case(RESUMES)
def test_resume_is_bitwise(jobs: dict[int, Job], world: int, case: Case) -> None:
    job, name = jobs[world], case.name
    whole, resumed = job.outcomes[name], job.outcomes[f"{name}-resumed"]
    assert resumed.losses == whole.losses[2:]
    assert resumed.norms == whole.norms[2:]
    assert resumed.heldout[str(STEPS)] == whole.heldout[str(STEPS)]
    assert resumed.heldout_of_average.get(str(STEPS)) == whole.heldout_of_average.get(str(STEPS))
    assert_same(job.saved(f"{name}-resumed"), job.saved(name))


@by_case(PROOFS)
def test_a_bad_step_on_one_rank_is_as_if_it_never_was(jobs: dict[int, Job], world: int, case: Case) -> None:
    job, name = jobs[world], f"{case.name}-bad"
    bad = job.outcomes[name]
    assert bad.skipped == [False, True, False]
    assert not math.isfinite(bad.norms[1])
    assert bad.heldout["2"] == bad.heldout["1"]
    assert_same(job.saved(name, 2), job.saved(name, 1))
    after = job.outcomes[f"{case.name}-after-bad"]
    assert (after.losses[-1], after.norms[-1]) == (bad.losses[-1], bad.norms[-1])
    assert_same(job.saved(f"{case.name}-after-bad", 3), job.saved(name, 3))


@pytest.mark.parametrize(("world", "source", "case"), READS, ids=lambda value: label(value))
def test_any_stage_and_world_reads_any_checkpoint(
    jobs: dict[int, Job], world: int, source: Case, case: Case
) -> None:
    writer, name, there = jobs[2], read_name(source, case), source.name
    assert_same(jobs[world].saved(name, 2), writer.saved(there, 2))
    found, right = jobs[world].outcomes[name], writer.outcomes[there]
    assert found.heldout["2"] == pytest.approx(right.heldout["2"], rel=1e-6)
    averages = [outcome.heldout_of_average.get("2", 0.0) for outcome in (found, right)]
    assert averages[0] == pytest.approx(averages[1], rel=1e-6)
    assert max(found.norms) < math.inf
    if world == 2:  # dropout seeds of these cases depend on the rank
        assert found.losses == pytest.approx(right.losses[2:], abs=1e-6)
        assert found.norms == pytest.approx(right.norms[2:], rel=1e-5)


@pytest.mark.slow
def test_every_optimizer_at_every_stage(tmp_path: Path) -> None:
    """Trained, averaged and resumed on one and two processes, and read by one at another stage."""
    found = {}
    for world in (2, 1):
        (folder := tmp_path / f"world{world}").mkdir()
        run_ranks(
            Path(__file__).with_name("zero_cases.py"), world, ["--slow", folder, tmp_path / "world2"], timeout=560
        )
        found[world] = Job(folder)
    for world, case in ((world, case) for world in WORLDS for case in SLOW):
        if case.precision == "fp32":
            test_training_is_that_of_plain_pytorch(found, world, case)
            if case.average != "none":
                test_averages_are_those_of_the_weights_after_each_step(found, world, case)
        if case.groups:
            test_frozen_parameters_keep_their_exact_values(found, world, case)
        test_resume_is_bitwise(found, world, case)
    for source, case in SLOW_READ:
        test_any_stage_and_world_reads_any_checkpoint(found, 1, source, case)
