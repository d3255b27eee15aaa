"""The encoder-decoder at every ZeRO stage, on whole texts and on slices of both, against plain AdamW."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from seq2seq_setup import CASES, IGNORE_INDEX, LEARNING_RATES, MICRO, STEPS, VOCAB, Case, rows
from support.launch import run_ranks
from support.plain_training import train_plainly
from torch import Tensor

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.checkpoint.files import step_folder
from reformer_dist.config import ParallelConfig
from reformer_dist.errors import ConfigError
from reformer_dist.planning import JobSpec
from reformer_dist.planning.traffic import HEADS, exchange_traffic

ALL = [pytest.param(world, case, id=f"{world}-{case.name}") for world in CASES for case in CASES[world]]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of the results of a number of processes, which run once, when they are first asked for."""

    @cache
    def run(world: int) -> Path:
        folder = tmp_path_factory.mktemp("seq2seq")
        run_ranks(Path(__file__).with_name("seq2seq_cases.py"), world, [folder], timeout=400, forked=True)
        return folder

    return run


@cache
def one_process(case: Case) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms and final weights of plain AdamW that stores activations, in other micro-batches."""
    model = case.model()

    def micro_batches(step: int) -> tuple[float, Iterator[Tensor]]:
        batch = rows(step)
        starts = range(0, len(batch["labels"]), 2 * MICRO)
        pieces = ({name: x[first : first + 2 * MICRO] for name, x in batch.items()} for first in starts)
        given = {"step": step, "dropout_seed": step}
        sums = (model(**micro, **given) for micro in pieces)
        return float((batch["labels"] != IGNORE_INDEX).sum()), sums

    losses, norms = train_plainly(model, case.config().optim, LEARNING_RATES, micro_batches)
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("world", "case"), ALL)
@pytest.mark.jobs
def test_training_is_that_of_plain_adamw(run_of: Callable[[int], Path], world: int, case: Case) -> None:
    found = json.loads((run_of(world) / "results.json").read_text())[case.name]
    losses, norms, weights = one_process(replace(case, stage=0, heads=1, buckets=1, recompute="none"))
    assert found["losses"] == pytest.approx(losses, rel=1e-6)
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > case.config().optim.grad_clip
    model = case.model()
    CheckpointReader(step_folder(run_of(world) / case.name, STEPS)).load_weights(model)
    for key, parameter in model.named_parameters():
        error = (parameter.detach() - weights[key]).abs().max().item()
        assert error <= 2e-6 * max(1.0, weights[key].abs().max().item()), f"{key} is off by {error}"


@pytest.mark.parametrize("case", [case for case in CASES[2] if case.heads == 2], ids=lambda case: case.name)
@pytest.mark.jobs
def test_bytes_of_heads_are_those_of_the_plan(run_of: Callable[[int], Path], case: Case) -> None:
    [sent] = json.loads((run_of(2) / "results.json").read_text())[case.name]["sent"]
    planned = exchange_traffic(JobSpec(case.config(), 2, 2, VOCAB, "cpu"))
    assert planned.keys() == {HEADS}
    assert sent == pytest.approx(planned[HEADS], rel=0.01)  # the plan leaves masks out


def test_more_ranks_than_heads_are_refused() -> None:
    config = Case().config()
    config.model.encoder_layers = config.model.layers  # without an exact one, which would be named first
    with pytest.raises(ConfigError, match=r"parallel\.sequence=8: .*model\.n_heads=4\b.*cross"):
        replace(config, parallel=ParallelConfig(sequence=8))
