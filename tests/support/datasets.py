"""Texts, shards and loaders for tests."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reformer_dist.data import (
    Corpus,
    Dataset,
    LoaderState,
    Quarantine,
    Sampler,
    SampleReader,
    SampleRef,
    StepBatch,
    TrainLoader,
    merge_states,
    read_state,
)
from reformer_dist.data.format.dataset_layout import FORMAT_VERSION, json_sha256
from reformer_dist.fs.atomic import file_sha256

ORDER = {"seed": 3, "batch_size": 8, "seq_len": 64, "shuffle": True, "interleaved_shards": None}


def numbered_text(number: int, length: int) -> bytes:
    """A text whose parts differ from those of any other number."""
    return b"".join(b"%d:%d " % (number, place) for place in range(length))[:length]


def varied_documents(n_documents: int = 60) -> list[tuple[str, bytes]]:
    """Lengths from 5 bytes to several thousand, most of them short."""
    lengths = [5 + (number * 37) % 90 + (3000 if number % 11 == 0 else 0) for number in range(n_documents)]
    return [(f"doc{number}", numbered_text(number, length)) for number, length in enumerate(lengths)]


def folder_of(dataset: Dataset) -> Path:
    return Path(dataset.folder.address)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def replace_split(folder: Path, split: str, texts: list[bytes]) -> None:
    """Replaces a split by one shard of byte-level texts, which may be empty."""
    path = folder / f"{split}-000000.tar"
    write_tar(path, [(f"{number}.txt", text) for number, text in enumerate(texts)])
    with tarfile.open(path) as tar:
        samples = [
            {"key": member.name[:-4], "document": member.name, "offset": member.offset_data, "size": member.size}
            | {"n_tokens": member.size + 1, "n_bytes": member.size, "sha256": hashlib.sha256(text).hexdigest()}
            for member, text in zip(tar, texts, strict=True)
        ]
    index = {"format": FORMAT_VERSION, "shard": path.name, "samples": samples}
    path.with_suffix(".json").write_text(json.dumps(index))
    n_bytes = sum(map(len, texts))
    shard = {"name": path.name, "size": path.stat().st_size, "sha256": file_sha256(path), "samples": len(texts)}
    shard |= {"tokens": n_bytes + len(texts), "text_bytes": n_bytes, "index_sha256": ""}
    edit_record(folder, lambda record: record["splits"].update({split: [shard]}), signs_indexes=True)


def edit_record(folder: Path, change: Callable[[dict[str, Any]], Any], signs_indexes: bool = False) -> None:
    """Edits dataset.json and its checksum and, on demand, those of the indexes."""
    path = folder / "dataset.json"
    record = json.loads(path.read_text())
    change(record)
    if signs_indexes:
        for shard in (shard for shards in record["splits"].values() for shard in shards):
            shard["index_sha256"] = file_sha256((folder / shard["name"]).with_suffix(".json"))
    record["sha256"] = json_sha256(record)
    path.write_text(json.dumps(record))


def edit_index(folder: Path, name: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Edits the samples of an index and all checksums."""
    path = folder / name
    record = json.loads(path.read_text())
    change(record["samples"])
    path.write_text(json.dumps(record))
    edit_record(folder, lambda record: None, signs_indexes=True)


def damage_sample(dataset: Dataset, number: int, split: str = "train") -> tuple[int, str, str]:
    """Flips a bit in the content of the n-th sample of a split; returns its id."""
    for shard in dataset.shards(split):
        entries = dataset.index(shard).entries
        if number < len(entries):
            path = folder_of(dataset) / shard.name
            content = bytearray(path.read_bytes())
            content[entries[number].offset] ^= 4
            path.write_bytes(content)
            return 0, shard.name, entries[number].key
        number -= len(entries)
    raise AssertionError("there are fewer samples")


def documents_of(dataset: Dataset, split: str = "train") -> list[np.ndarray]:
    """Tokens of each sample, in the order of the shards."""
    with closing(SampleReader()) as reader:
        return [
            reader.read(SampleRef(dataset, shard, entry))
            for shard in dataset.shards(split)
            for entry in dataset.index(shard).entries
        ]


def make_sampler(data: Dataset | Corpus, **changed: Any) -> Sampler:
    corpus = data if isinstance(data, Corpus) else Corpus([data])
    settings = ORDER | {key: value for key, value in changed.items() if key in ORDER}
    return Sampler(corpus, **settings)


def open_loader(
    data: Dataset | Corpus,
    *,
    state: dict[str, Any] | None = None,
    max_damaged_fraction: float = 0.5,
    accept_changed: bool = False,
    **changed: Any,
) -> TrainLoader:
    """A loader of ORDER; `changed` may name its keys and those of TrainLoader."""
    sampler = make_sampler(data, **changed)
    resumed = LoaderState() if state is None else read_state(state, sampler, accept_changed=accept_changed)
    quarantine = Quarantine(sampler.corpus.total("samples", "train"), max_damaged_fraction, resumed.quarantine)
    own = {key: value for key, value in changed.items() if key not in ORDER}
    return TrainLoader(sampler, quarantine, state=resumed, **({"micro_batch_size": 1, "workers": 0} | own))


def read_steps(data: Dataset | Corpus, n_steps: int, **changed: Any) -> tuple[list[StepBatch], dict[str, Any]]:
    """A rank's batches, and its state after the last of them."""
    with open_loader(data, **changed) as loader:
        batches = [next(loader) for _ in range(n_steps)]
        return batches, json.loads(json.dumps(batches[-1].state))


def rows_of(step: Iterable[StepBatch], name: str) -> torch.Tensor:
    """A tensor of all rows of a step, given the batches of all ranks."""
    return torch.cat([rows[name] for batch in step for rows in batch.batches])


def read_world(
    data: Dataset | Corpus, n_steps: int, dp_size: int = 1, **changed: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Inputs and labels of all ranks [n_steps, 2, batch_size, seq_len], and the state after them."""
    ranks = [read_steps(data, n_steps, dp_rank=rank, dp_size=dp_size, **changed) for rank in range(dp_size)]
    steps = zip(*(batches for batches, _ in ranks), strict=True)
    rows = [torch.stack([rows_of(step, name) for name in ("tokens", "labels")]) for step in steps]
    return torch.stack(rows), merge_states([state for _, state in ranks])
