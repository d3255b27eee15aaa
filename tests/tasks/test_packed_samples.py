"""Rows of several samples: each sample once, in the order of rows of one, with the same loss and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_data import make, read_steps, write_pairs

from reformer_dist.data import (
    ByteTokenizer,
    Corpus,
    Dataset,
    DrawKey,
    Era,
    LoaderState,
    RawSample,
    Replay,
    Sampler,
    SampleReader,
    SampleRef,
    consumed_hash,
    make_sample,
    merge_states,
    read_state,
    write_samples,
)
from reformer_dist.data.loading.cut import count_packed_rows
from reformer_dist.errors import DataError

BATCH, SEQ_LEN = 3, 96
PACKED = ("data.pack_samples=true", f"data.seq_len={SEQ_LEN}", "model.axial_shape=[8,32]")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 samples of 10 to 200 tokens, of which those above SEQ_LEN are cut."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", most=20)


def open_sampler(data: Path, seq_len: int = SEQ_LEN, *, packs: bool = True) -> Sampler:
    corpus = Corpus.open([data])
    return Sampler(corpus, seed=3, batch_size=BATCH, seq_len=seq_len, by_sample=True, pack_samples=packs)


def read(
    data: Path, n_steps: int, *, packs: bool = True, seq_len: int = SEQ_LEN, **place: Any
) -> tuple[list[list[dict[str, torch.Tensor]]], dict]:
    """As `task_data.read_steps`."""
    task = make("completion", data, *PACKED, f"data.seq_len={seq_len}", f"data.pack_samples={str(packs).lower()}")
    return read_steps(task, open_sampler(data, seq_len, packs=packs), n_steps, **place)


def samples_of(steps: list[list[dict[str, torch.Tensor]]]) -> list[tuple[int, ...]]:
    """The tokens of every sample of all rows, without padding."""
    found = []
    for batch in (batch for step in steps for batch in step):
        for row, tokens in enumerate(batch["tokens"]):
            real = batch["labels"][row] >= 0
            if "document_ids" not in batch:
                found += [tuple(tokens[: int(real.nonzero()[-1]) + 1].tolist())] if real.any() else []
                continue
            for document in batch["document_ids"][row].unique():
                own = batch["document_ids"][row] == document
                if real[own].any():
                    found.append(tuple(tokens[own].tolist()))
    return found


def all_samples(data: Path) -> list[tuple[int, ...]]:
    """What `read` must find in one pass, sorted."""
    task, dataset, reader, found = make("completion", data, *PACKED), Dataset.open(data), SampleReader(), []
    for shard in dataset.shards("train"):
        for entry in dataset.index(shard).entries:
            ref = SampleRef(dataset, shard, entry)
            example = task.encode(make_sample(ref, reader.read(ref)), DrawKey.heldout(0))
            assert len(example["tokens"]) == min(entry.n_tokens, SEQ_LEN)
            found.append(tuple(example["tokens"].tolist()))
    return sorted(found)


@pytest.mark.parametrize("passes", [1, 3])
def test_passes_read_every_sample_as_often_in_any_world(data: Path, passes: int) -> None:
    steps = open_sampler(data).last_step(passes)
    whole, state = read(data, steps, passes=passes)
    assert sorted(samples_of(whole)) == sorted(passes * all_samples(data))
    assert len(samples_of(whole[:-1])) < passes * 50, "the last step is empty"
    assert samples_of(read(data, steps + 1, passes=passes)[0][-1:]) == []
    by_rank = [read(data, steps, rank=rank, size=BATCH, passes=passes) for rank in range(BATCH)]
    of_ranks = [sorted(samples_of([part for own, _ in by_rank for part in (own[step],)])) for step in range(steps)]
    assert of_ranks == [sorted(samples_of([step])) for step in whole]
    assert merge_states([own for _, own in by_rank]) == merge_states([state])
    replay = Replay(open_sampler(data), LoaderState(), passes=passes)
    replay.skip(2)
    for _ in range(steps - 2):
        replay.next_step()
    assert replay.hash == consumed_hash(merge_states([state]))


def test_rows_are_filled_as_far_as_samples_fit(data: Path) -> None:
    rows, _ = read(data, 8)
    unpacked, _ = read(data, 60, packs=False)
    lengths = {stream: [] for stream in range(BATCH)}
    for step in unpacked:
        for batch in step:
            lengths[int(batch["rows"])].append(len(samples_of([[batch]])[0]))
    for step in rows:
        for batch in step:
            stream, found = int(batch["rows"]), [len(sample) for sample in samples_of([[batch]])]
            expected, lengths[stream] = lengths[stream][: len(found)], lengths[stream][len(found) :]
            assert found == expected and sum(found) <= SEQ_LEN < sum(found) + lengths[stream][0]
            own = batch["document_ids"][0]
            positions = torch.cat([torch.arange(int((own == document).sum())) for document in own.unique()])
            is_sample = own < 2**31 - 1
            assert torch.equal(batch["position_ids"][0][is_sample], positions[is_sample])
    counted = count_packed_rows(np.array([3, 7, 1, 10, 10, 4, 4, 4]), 10)
    assert counted == 6  # 3 7 | 1 | 10 | 10 | 4 4 | 4
    assert count_packed_rows(np.array([], dtype=np.int64), 10) == 0


def test_resuming_continues_with_the_next_samples(data: Path) -> None:
    whole, _ = read(data, 12)
    first, state = read(data, 5)
    then, _ = read(data, 7, state=json.loads(json.dumps(state)))
    assert samples_of(first) + samples_of(then) == samples_of(whole)


@pytest.mark.parametrize("then", [{"packs": False}, {"seq_len": 64}])
def test_a_run_may_go_on_unpacked_or_at_another_length(data: Path, then: dict) -> None:
    begun = Replay(open_sampler(data), LoaderState(), passes=1)
    names = [span.id for _ in range(4) for row in begun.next_step() for span in row]
    state = json.loads(json.dumps(begun.state.to_json(open_sampler(data))))
    other = open_sampler(data, **then)
    rest = Replay(other, read_state(state, other), passes=1)
    while step := [span.id for row in rest.next_step() for span in row]:
        names += step
    assert len(names) == len(set(names)) == 50


def test_damaged_samples_are_skipped(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data", most=20)
    expected, dataset = all_samples(data), Dataset.open(data)
    shard = dataset.shards("train")[0]
    content = bytearray((data / shard.name).read_bytes())
    for entry in dataset.index(shard).entries[2:20:6]:
        content[entry.offset] ^= 1
    (data / shard.name).write_bytes(content)
    steps = open_sampler(data).last_step(1)
    found, state = read(data, steps, passes=1)
    assert len(state["quarantine"]) == 3 and len(samples_of(found)) == 47
    assert set(samples_of(found)) <= set(expected)
    first, state = read(data, 3, passes=1)
    then, _ = read(data, steps - 3, state=json.loads(json.dumps(state)), passes=1)
    assert samples_of(first) + samples_of(then) == samples_of(found)


@pytest.mark.parametrize("layers", ["[local,lsh]", "[lsh,exact]"])
def test_loss_and_gradients_are_those_of_padded_rows(data: Path, layers: str) -> None:
    options = (f"model.layers={layers}", "model.head_dim=16", "model.next_value_heads=1", "model.dropout=0")
    task = make("completion", data, *PACKED, "data.seq_len=256", *options)
    packed = [batch for step in read(data, 3, seq_len=256)[0] for batch in step]
    padded, unpacked = [], [row for step in read(data, 40, packs=False, seq_len=256)[0] for row in step]
    for stream in range(BATCH):
        n_samples = sum(len(samples_of([[batch]])) for batch in packed if int(batch["rows"]) == stream)
        padded += [row for row in unpacked if int(row["rows"]) == stream][:n_samples]
    found = []
    for batches in (packed, padded):
        torch.manual_seed(0)
        model, loss, n_labels = task.build_model(), torch.zeros(()), 0
        with torch.no_grad():  # attention hardly matters at initialization
            for name, weight in model.named_parameters():
                weight.mul_(5 if name.endswith("to_out.weight") else 1)
        for batch in batches:
            loss = loss + model(**{name: x for name, x in batch.items() if name != "rows"}, step=1)
            n_labels += int((batch["labels"] >= 0).sum())
        loss.backward()
        found.append((loss.item(), n_labels, [parameter.grad for parameter in model.parameters()]))
    (loss, n_labels, grads), (padded_loss, n_padded, padded_grads) = found
    assert len(padded) > len(packed) and n_labels == n_padded and loss == pytest.approx(padded_loss, rel=1e-6)
    for grad, padded_grad in zip(grads, padded_grads, strict=True):
        torch.testing.assert_close(grad / n_labels, padded_grad / n_labels, atol=1e-6, rtol=1e-6)


def test_samples_with_label_spans_are_packed_by_their_length(tmp_path: Path) -> None:
    records = [RawSample(f"line{n}", (b"abc def " * (n % 5 + 1),), label_spans=((2, 5),)) for n in range(30)]
    write_samples(records, tmp_path / "data", ByteTokenizer(), heldout=records[:3], label_spans=True)
    sampler = open_sampler(tmp_path / "data")
    steps, _ = read(tmp_path / "data", sampler.last_step(1), passes=1)
    assert sorted(samples_of(steps)) == all_samples(tmp_path / "data")
    assert sum(int((batch["labels"] >= 0).sum()) for step in steps for batch in step) == 90


def test_epochs_of_rows_that_change_are_refused(data: Path) -> None:
    with pytest.raises(DataError, match=r"data\.epochs: .*data\.pack_samples=true"):
        open_sampler(data).last_step(1, eras=[Era(1, 2, 8), Era(None, 2, 16)])
