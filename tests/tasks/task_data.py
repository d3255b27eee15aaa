"""Small datasets of several fields, and tasks over them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from support.tiny import tiny_config
from torch import Tensor

from reformer_dist.data import (
    ByteTokenizer,
    LoaderState,
    Quarantine,
    RawSample,
    Sampler,
    TrainLoader,
    read_state,
    write_samples,
)
from reformer_dist.tasks import Task, make_task

WORDS = ["red", "green", "blue", "grey", "white", "black"]


def sentence(draw: random.Random, most: int = 8) -> bytes:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most))).encode()


def write_pairs(folder: Path, n_samples: int = 60, most: int = 8) -> Path:
    """Two fields: a sentence, and its words in reverse order."""
    draw = random.Random(1)
    texts = [sentence(draw, most) for _ in range(n_samples)]
    records = [
        RawSample(f"pair{number}", (text, b" ".join(reversed(text.split(b" ")))))
        for number, text in enumerate(texts)
    ]
    write_samples(
        records[10:],
        folder,
        ByteTokenizer(),
        shard_bytes=20_000,
        heldout=records[:10],
        fields=("source", "target"),
    )
    return folder


def write_for(kind: str, folder: Path) -> Path:
    """Samples with a label, or questions about a context that is longer than a row."""
    draw = random.Random(2)
    records = []
    for number in range(40):
        words = draw.choices(WORDS, k=30)
        if kind == "sequence_classification":
            records.append(RawSample(f"text{number}", (" ".join(words[:8]).encode(),), {"label": words[0]}))
        else:
            at, context = draw.randrange(30), " ".join(words)
            answers = [[len(" ".join(words[:at])) + (at > 0), words[at]]]
            records.append(
                RawSample(f"question{number}", (words[at].encode(), context.encode()), {"answers": answers})
            )
    fields, labels = (("text",), WORDS) if kind == "sequence_classification" else (("question", "context"), [])
    write_samples(records[8:], folder, ByteTokenizer(), heldout=records[:8], fields=fields, labels=labels)
    return folder


def make(kind: str, data: Path, *changed: str, labels: tuple[str, ...] = ()) -> Task:
    return make_task(tiny_config(data, Path("unused"), f"task.kind={kind}", *changed), ByteTokenizer(), labels)


def read_steps(
    task: Task,
    sampler: Sampler,
    n_steps: int,
    *,
    rank: int = 0,
    size: int = 1,
    state: dict[str, Any] | None = None,
    passes: int | None = None,
    micro_batch: int = 1,
) -> tuple[list[list[dict[str, Tensor]]], dict[str, Any]]:
    """Micro-batches of each step that a rank reads from a state on, and the state after them."""
    resumed = LoaderState() if state is None else read_state(state, sampler)
    place = {"dp_rank": rank, "dp_size": size, "state": resumed, "passes": passes}
    quarantine = Quarantine(100, 0.5, resumed.quarantine)
    with TrainLoader(
        sampler, quarantine, micro_batch_size=micro_batch, workers=2, make_example=task.make_example, **place
    ) as loader:
        steps = [next(loader) for _ in range(n_steps)]
        return [step.batches for step in steps], steps[-1].state


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
