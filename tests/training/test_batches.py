"""BatchReader: all ranks agree before a step that each could read, and that ranks of a sequence read the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_helpers import LOSS, checkpoint, damage_samples, train
from support.events import scalars
from support.threads import on_ranks

from reformer_dist.data import Corpus, Quarantine, Sampler, TrainLoader
from reformer_dist.distributed.mesh import SequenceMesh, make_mesh
from reformer_dist.distributed.runtime import Runtime, SharedError
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.batches import BatchReader

SEQ_LEN, BATCH_SIZE = 64, 4


def read(folders: list[Path], mesh: SequenceMesh, n_steps: int) -> list[list[torch.Tensor] | Exception]:
    """Labels of each step on ranks that share sequences but have their own copies of the data; or their errors."""

    def of_rank(runtime: Runtime) -> list[torch.Tensor]:
        corpus = Corpus.open([folders[runtime.rank]])
        sampler = Sampler(corpus, seed=0, batch_size=BATCH_SIZE, seq_len=SEQ_LEN)
        quarantine = Quarantine(corpus.total("samples", "train"), 0.9)
        sequence = SlicedSequence(replace(mesh, buckets=len(folders), bucket_rank=runtime.rank), SEQ_LEN)
        with TrainLoader(sampler, quarantine, micro_batch_size=2) as loader:
            reader = BatchReader(runtime, sequence, loader)
            steps = [reader.next_step() for _ in range(n_steps)]
        assert {step.n_labels for step in steps} == {SEQ_LEN * BATCH_SIZE}
        return [torch.cat([batch.tensors["labels"] for batch in step.micro_batches]) for step in steps]

    return on_ranks(len(folders), of_rank)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_of_one_sequence_read_the_same(tiny_data: Path, tmp_path: Path, job: Runtime, n_ranks: int) -> None:
    mesh = make_mesh(job, 1, 1)
    slices = read([tiny_data] * n_ranks, mesh, 5)
    whole = read([tiny_data], mesh, 5)[0]
    assert not isinstance(whole, Exception)
    for step, expected in enumerate(whole):
        joined = torch.cat([labels[step] for labels in slices if not isinstance(labels, Exception)], dim=-1)
        assert torch.equal(joined[..., :SEQ_LEN], expected)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_disks_that_differ_are_noticed(tiny_data: Path, tmp_path: Path, job: Runtime, odd: int) -> None:
    """Samples are damaged on one of the ranks: the others must not train on other rows."""
    folders = [tiny_data] * 3
    folders[odd] = damage_samples(tiny_data, tmp_path / "damaged")
    for error in read(folders, make_mesh(job, 1, 1), 40):
        assert isinstance(error, SharedError)
        assert "different rows" in str(error)


def test_an_epoch_of_little_but_damage_ends_as_planned(
    tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    """Steps that have nothing left to read change neither the plan nor, beyond Adam's moments, the weights."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for path in sorted(data.glob("train-*.tar"))[:-1]:
        path.write_bytes(bytes(path.stat().st_size))
    changed = ("data.epochs=1", "data.seq_len=128", "data.batch_size=40", "trainer.micro_batch_size=20")
    run = train(job, data, tmp_path / "run", *changed, "trainer.max_steps=100", "data.max_damaged_fraction=0.95")
    assert "data.epochs=1 ends the run at step 4" in said.messages
    assert sorted(scalars(run, LOSS)) == [1, 2, 3, 4]
    assert checkpoint(run, 4).exists()
