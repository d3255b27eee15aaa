"""A whole model trained on slices, by mesh and ZeRO stage, against one process with whole sequences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from model_setup import IGNORE_INDEX, JOBS, LEARNING_RATES, MICRO, SLOW, STEPS, Case, rows
from support.launch import run_ranks
from support.plain_training import train_plainly
from torch import Tensor

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.checkpoint.files import step_folder

pytestmark = pytest.mark.jobs

ALL = [
    pytest.param(name, case, marks=[pytest.mark.slow] if name in SLOW else [], id=f"{name}-{case.name}")
    for name, (_, cases) in JOBS.items()
    for case in cases
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a job's results; a job runs once, when it is first asked for."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp("job")
        run_ranks(
            Path(__file__).with_name("model_cases.py"), JOBS[name][0], [name, folder], timeout=500, forked=True
        )
        return folder

    return run


@cache
def one_process(case: Case) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms and final weights of plain AdamW on whole sequences, in micro-batches of another size."""
    model = case.model()

    def micro_batches(step: int) -> tuple[float, Iterator[Tensor]]:
        inputs, labels = rows(step, case.seq_len)
        starts = range(0, len(inputs), 2 * MICRO)
        pieces = (slice(first, first + 2 * MICRO) for first in starts)
        numbers = torch.arange(len(inputs))
        given = {"step": step, "dropout_seed": step}
        sums = (model(inputs[its], labels[its], rows=numbers[its], **given) for its in pieces)
        return float((labels != IGNORE_INDEX).sum()), sums

    losses, norms = train_plainly(model, case.config().optim, LEARNING_RATES, micro_batches)
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "case"), ALL)
def test_training_is_that_of_one_process(run_of: Callable[[str], Path], name: str, case: Case) -> None:
    found = json.loads((run_of(name) / "results.json").read_text())[case.name]
    losses, norms, weights = one_process(replace(case, stage=0, heads=1, buckets=1, precision="fp32"))
    assert max(norms) > case.config().optim.grad_clip  # some steps are clipped, and some of most models' are not
    assert case.layers != Case().layers or case.config().optim.grad_clip > min(norms)
    if case.precision == "bf16":
        assert found["losses"] == pytest.approx(losses, abs=5e-3)
        assert found["norms"] == pytest.approx(norms, rel=0.03)
        return
    assert found["losses"] == pytest.approx(losses, rel=1e-6)
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    model = case.model()
    CheckpointReader(step_folder(run_of(name) / case.name, STEPS)).load_weights(model)
    for key, parameter in model.named_parameters():
        error = (parameter.detach() - weights[key]).abs().max().item()
        assert error <= 2e-6 * max(1.0, weights[key].abs().max().item()), f"{key} is off by {error}"
