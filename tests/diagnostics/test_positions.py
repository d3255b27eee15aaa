"""The loss by position adds up to the loss, for any division of the rows over ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from position_cases import SEQ_LEN, make_model, run_positions

from reformer_dist.data import IGNORE_INDEX
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.ops.cross_entropy import chunked_cross_entropy, token_cross_entropy
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.evaluation import evaluate
from reformer_dist.training.positions import octave_of


def test_octaves() -> None:
    positions = [0, 1, 63, 64, 127, 128, 255, 256, 2**20 - 1, 2**20]
    assert octave_of(torch.tensor(positions)).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 14, 15]


@pytest.mark.parametrize("chunk", [3, 100])
def test_the_loss_of_each_token(chunk: int) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((7, 5), (11, 5), (11,)))
    labels = torch.tensor([0, 10, IGNORE_INDEX, 3, 4, IGNORE_INDEX, 6])
    losses = token_cross_entropy(hidden, weight, bias, labels, chunk)
    expected = F.cross_entropy(hidden @ weight.T + bias, labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(losses.sum(), chunked_cross_entropy(hidden, weight, bias, labels, chunk))


def test_positions_add_up_to_the_loss(job: Runtime) -> None:
    model, task, rows = make_model()
    sequence = SlicedSequence(make_mesh(job, 1, 1), SEQ_LEN)
    plain = evaluate(model, [rows], task, job, sequence)
    result = evaluate(model, [rows], task, job, sequence, by_position=True)
    assert plain.positions == [] and result.loss == pytest.approx(plain.loss, rel=1e-6)
    assert sum(each.n_labels for each in result.positions) == plain.n_labels
    nats = sum(each.loss * each.n_labels for each in result.positions)
    assert nats == pytest.approx(plain.loss * plain.n_labels, rel=1e-6)
    logits = model(rows["tokens"])
    last = F.cross_entropy(logits[:, 128:].flatten(0, 1), rows["labels"][:, 128:].flatten())
    assert result.positions[-1].loss == pytest.approx(last.item(), rel=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_positions_of_shared_rows_are_those_of_whole_rows(run_on: Callable[..., None], heads: int) -> None:
    run_on(4, run_positions, heads=heads)
