"""Runs the trainer in this process, and reads its output."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from support.tiny import tiny_config
from torch import Tensor

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.data import Corpus, Dataset, RowSelection, heldout_text_batches, merge_states
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.models import ReformerLM
from reformer_dist.process.log import logger
from reformer_dist.run.build import build_trainer
from reformer_dist.run.pretrained import load_model
from reformer_dist.training.preemption import StopSignal

LOSS = "train/loss"
# of 2 x 256, 2 x 256 and 2 x 256 tokens; the second ends by tokens
STAGED = (
    "stages=[{until: 2, data.seq_len: 32, data.batch_size: 8, trainer.micro_batch_size: 2, model.n_buckets: 2},"
    "{until_tokens: 1024, model.n_hashes: 2, model.window: 8, model.local_window: 8},"
    "{data.seq_len: 128, data.batch_size: 2, model.rotary_base: 500}]",
    "model.position=rotary",
)


def train(job: Runtime, data: Path, output: Path, *changed: str, stop: StopSignal | None = None) -> Path:
    """Trains as `reformer-train` would; returns the run directory."""
    with ExitStack() as resources:
        build_trainer(tiny_config(data, output, *changed), job, resources, stop).fit()
    return output


def losses(run: Path) -> dict[int, dict[str, float]]:
    """Rows of metrics.jsonl by step, without speed, time and memory; each step must appear once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)
    return {row["step"]: {tag: row[tag] for tag in row if not tag.startswith(("perf/", "time_s"))} for row in rows}


@contextmanager
def when_told(**actions: Callable[[], object]) -> Iterator[None]:
    """Runs each action at the first log line that contains its name, with _ for a space."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for words in [each for each in actions if each.replace("_", " ") in record.getMessage()]:
                actions.pop(words)()

    listener = Listener()
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
    assert not actions


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def interrupted(run: Path, output: Path, *steps: int) -> Path:
    """A run directory as if the run had been killed some time after saving these steps."""
    for step in steps:
        shutil.copytree(checkpoint(run, step), checkpoint(output, step))
    return output


def damage(folder: Path) -> None:
    """Changes a byte of the weights."""
    path = folder / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_samples(data: Path, copy: Path) -> Path:
    """A copy of a dataset with a flipped bit in every third training sample."""
    shutil.copytree(data, copy)
    dataset = Dataset.open(copy)
    for shard in dataset.shards("train"):
        path = copy / shard.name
        content = bytearray(path.read_bytes())
        for entry in dataset.index(shard).entries[1::3]:
            content[entry.offset + 5] ^= 1
        path.write_bytes(content)
    return copy


def data_state(folder: Path) -> dict[str, Any]:
    return merge_states([rank["data"] for rank in CheckpointReader(folder).rank_states])


@torch.no_grad()
def heldout_loss(folder: Path, seq_len: int) -> tuple[float, float]:
    """(nats per token, bits per byte) of a checkpoint on the whole held-out text, one row at a time."""
    loaded = load_model(folder, [], torch.device("cpu"))
    corpus = Corpus.open([loaded.config.data.path])
    n_all = corpus.total("tokens", "heldout")
    batch = next(heldout_text_batches(corpus, RowSelection(), seq_len=n_all))
    tokens = torch.cat([batch["tokens"][0], batch["labels"][0, -1:]])
    n_tokens = len(tokens) - 1
    nats = sum(_nats(loaded.model, tokens[start : start + seq_len + 1]) for start in range(0, n_tokens, seq_len))
    n_bytes = corpus.total("text_bytes", "heldout")
    return nats / n_tokens, nats / torch.tensor(2.0, dtype=torch.float64).log().item() / n_bytes


def _nats(model: ReformerLM, row: Tensor) -> float:
    probabilities: Tensor = model(row[None, :-1])[0].double().log_softmax(-1)
    return -probabilities.gather(-1, row[1:, None]).sum().item()
