"""Samples of several fields are read as they were written, one per row, in the same order in any world."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_data import make, read_steps, sentence, write_pairs

from reformer_dist.data import (
    ByteTokenizer,
    Corpus,
    Dataset,
    LoaderState,
    RawSample,
    Replay,
    RowSelection,
    Sampler,
    SampleReader,
    SampleRef,
    consumed_hash,
    make_sample,
    merge_states,
    read_split,
    read_state,
    write_dataset,
    write_samples,
)
from reformer_dist.errors import DataError

BATCH = 6


def pairs(folder: Path) -> dict[str, tuple[bytes, ...]]:
    draw = random.Random(1)
    texts = [sentence(draw) for _ in range(60)]
    return {f"pair{n}": (text, b" ".join(reversed(text.split(b" ")))) for n, text in enumerate(texts)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data")


def make_sampler(data: Path) -> Sampler:
    return Sampler(Corpus.open([data]), seed=3, batch_size=BATCH, seq_len=64, by_sample=True)


def read(
    data: Path, n_steps: int, *, size: int = 1, micro_batch: int | None = None, **place: Any
) -> tuple[list[list[dict[str, torch.Tensor]]], dict]:
    """As `task_data.read_steps`, all rows of a rank at once by default."""
    place |= {"size": size, "micro_batch": micro_batch or BATCH // size}
    return read_steps(make("completion", data), make_sampler(data), n_steps, **place)


def rows(steps: list[list[dict[str, torch.Tensor]]]) -> list[list[int]]:
    """Labels of each row, without padding."""
    return [row[row >= 0].tolist() for step in steps for batch in step for row in batch["labels"]]


def test_fields_come_back(data: Path) -> None:
    dataset, expected, reader = Dataset.open(data), pairs(data), SampleReader()
    found = {}
    for split in ("train", "heldout"):
        for shard in dataset.shards(split):
            for entry in dataset.index(shard).entries:
                ref = SampleRef(dataset, shard, entry)
                tokens = reader.read(ref)
                assert len(tokens) == entry.n_tokens == sum(entry.lengths) + 2
                assert (tokens == 256).sum() == 2
                sample = make_sample(ref, tokens)
                found[sample.name] = tuple(field.astype(np.uint8).tobytes() for field in sample.fields)
    assert found == expected
    assert dataset.fields == ["source", "target"]
    assert {sample.name for sample in read_split(Corpus([dataset]), RowSelection())} == {
        f"pair{n}" for n in range(10)
    }


def test_a_pass_reads_every_sample_once_in_any_world(data: Path) -> None:
    steps = make_sampler(data).last_step(1)
    assert steps == -(-50 // BATCH)
    whole, state = read(data, steps, passes=1)
    seen = sorted(bytes(row[:-1]) for row in rows(whole) if row)
    assert seen == sorted(target for name, (_, target) in pairs(data).items() if int(name[4:]) >= 10)
    by_rank = [read(data, steps, rank=rank, size=2, passes=1) for rank in range(2)]
    of_ranks = [rows([part for rank in by_rank for part in (rank[0][step],)]) for step in range(steps)]
    assert [sorted(step) for step in of_ranks] == [sorted(rows([step])) for step in whole]
    assert merge_states([rank_state for _, rank_state in by_rank]) == merge_states([state])
    numbers = [torch.cat([batch["rows"] for batch in step]).tolist() for step in whole]
    assert [sorted(step) for step in numbers] == [list(range(BATCH))] * steps
    replay = Replay(make_sampler(data), LoaderState(), passes=1)
    for _ in range(steps):
        replay.next_step()
    assert replay.hash == consumed_hash(merge_states([state]))


def test_rows_of_similar_length_share_a_micro_batch(data: Path) -> None:
    steps, _ = read(data, 6, micro_batch=2)
    for step in steps:
        assert [batch["tokens"].shape[0] for batch in step] == [2, 2, 2]
        lengths = [(row != 0).sum().item() for batch in step for row in batch["tokens"]]
        assert lengths == sorted(lengths)
        for batch in step:
            longest = max((row != 0).sum().item() for row in batch["tokens"])
            assert longest <= batch["tokens"].shape[1] < longest + 8


def test_resuming_continues_with_the_next_samples(data: Path) -> None:
    whole, _ = read(data, 12)
    first, state = read(data, 5)
    then, _ = read(data, 7, state=json.loads(json.dumps(state)))
    assert rows(first) + rows(then) == rows(whole)


def test_a_damaged_sample_is_skipped(data: Path, tmp_path: Path) -> None:
    copy = write_pairs(tmp_path / "copy")
    dataset = Dataset.open(copy)
    shard = dataset.shards("train")[0]
    entry = dataset.index(shard).entries[3]
    content = bytearray((copy / shard.name).read_bytes())
    content[entry.offset] ^= 1
    (copy / shard.name).write_bytes(content)
    found, state = read(copy, 2 * make_sampler(copy).last_step(1))
    assert [sample[2] for sample in state["quarantine"]] == [entry.key]
    assert len(rows(found)) == len([row for row in rows(found) if row])


def test_tasks_refuse_data_of_the_other_kind(data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    write_dataset(
        [(f"doc{n}", b"words " * (n + 1)) for n in range(20)], text, ByteTokenizer(), heldout_fraction=0.3
    )
    assert "fields" not in json.loads((text / "dataset.json").read_text())
    make("language_model", text).check(Corpus.open([text]))
    with pytest.raises(DataError, match=r"source, target; task\.kind=language_model"):
        make("language_model", data).check(Corpus.open([data]))
    with pytest.raises(DataError, match=r"task\.kind=completion .*prompt and completion"):
        make("completion", text).check(Corpus.open([text]))
    with pytest.raises(DataError, match=r"task\.kind: .*another output_dir"):
        state = Sampler(Corpus.open([data]), seed=3, batch_size=BATCH, seq_len=64).settings()
        read_state({"version": 2, "settings": state}, make_sampler(data))


def test_an_unknown_label_is_named(tmp_path: Path) -> None:
    records = [RawSample(f"line{n}", (b"text %d" % n,), {"label": "ab"[n % 2]}) for n in range(10)]
    odd = [RawSample("other:7", (b"more",), {"label": "c"})]
    with pytest.raises(DataError, match=r"other:7: .*label 'c'.*\ba, b"):
        write_samples(records, tmp_path / "data", ByteTokenizer(), heldout=odd, labels=["a", "b"])


def test_dropout_of_a_row_is_the_same_in_any_world(data: Path) -> None:
    """Rows of similar length share a micro-batch; which do, and in which order, depends on the ranks."""
    drops = ("model.dropout=0.3", "model.ff_dropout=0.2", "model.attention_dropout=0.3")
    torch.manual_seed(0)
    model = make("completion", data, "model.layers=[local,lsh]", *drops).build_model()
    found = []
    for worlds in ([(0, 1, 6)], [(0, 1, 2)], [(0, 2, 1), (1, 2, 3)]):
        batches = [read(data, 1, rank=rank, size=size, micro_batch=micro)[0][0] for rank, size, micro in worlds]
        with torch.no_grad():
            losses = [model(**batch, step=1, dropout_seed=7) for of_rank in batches for batch in of_rank]
        found.append(torch.stack(losses).sum())
    torch.testing.assert_close(torch.stack(found), found[0].expand(3))
