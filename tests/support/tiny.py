"""The smallest dataset and configuration that still use every part."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from reformer_dist.config import RunConfig
from reformer_dist.data import ByteTokenizer, write_dataset
from reformer_dist.run.compose import run_config_from, to_dict


def flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("model.dim", 256) and so on, of a configuration as plain values."""
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        leaves += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return leaves


WORDS = (
    "time",
    "water",
    "light",
    "house",
    "little",
    "great",
    "under",
    "never",
    "river",
    "people",
    "stone",
    "word",
)
CHOICES = ("deepspeed.", "launcher.", "sweep.")
TINY = {
    **{key: value for key, value in flat(to_dict(RunConfig())) if not key.startswith(CHOICES)},
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.n_buckets": 4,
    "model.window": 16,
    "model.local_window": 16,
    "model.axial_shape": [8, 16],
    "model.dropout": 0.1,
    "data.seq_len": 64,
    "data.batch_size": 4,
    "data.eval_rows": 6,
    "optim.lr": 0.01,
    "optim.warmup_steps": 2,
    "deepspeed.param_persistence_threshold": 0,
    "trainer.max_steps": 6,
    "trainer.micro_batch_size": 1,
    "trainer.log_every": 1,
    "trainer.eval_every": 0,
    "trainer.save_every": 3,
    "trainer.keep_checkpoints": 0,
}


def write_tiny_dataset(folder: Path, heldout_fraction: float = 0.15) -> Path:
    """40 documents of 40 to 160 words, some of them held out, in several shards."""
    draw = random.Random(0)
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(40, 160))) for _ in range(40))
    documents = [(f"doc{number}", text.encode()) for number, text in enumerate(texts)]
    write_dataset(documents, folder, ByteTokenizer(), shard_bytes=10_000, heldout_fraction=heldout_fraction)
    return folder


def tiny_overrides(data: Path, output: Path, *changed: str) -> list[str]:
    """Command-line overrides of a run of 6 steps, 256 tokens each, that takes about a second.

    They name every key but those of deepspeed=..., launcher=... and sweep=..., so that no default of conf/ shows.
    """
    given = TINY | {"data.path": data, "output_dir": output}
    return [*(f"{key}={_words(value)}" for key, value in given.items()), *changed]


def _words(value: object) -> str:
    """As Hydra reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(_words, value))}]"
    return "null" if value is None else str(value)


def tiny_config(data: Path, output: Path, *changed: str) -> RunConfig:
    """The same run as a RunConfig."""
    return run_config_from(to_dict(RunConfig()), tiny_overrides(data, output, *changed))
