"""What the model reads: the data set, the length of a row, the rows of a step."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.config.checks import at_least


@dataclass(kw_only=True)
class DataConfig:
    """A data set written by tools/make_shards.py and how it is cut into rows."""

    path: str = "data/quickstart"
    """Folder that holds dataset.json and the shards."""
    seq_len: int = 1024
    """Tokens of a row that the model sees; one more is read for the last label."""
    batch_size: int = 8
    """Rows of one optimizer step, over all ranks."""
    shuffle_buffer: int = 1000
    """Documents of a shard among which the order is drawn; 1 keeps the shard's order."""
    eval_rows: int = 64
    """Held-out rows of one evaluation during training; 0 means all of them."""

    def __post_init__(self) -> None:
        at_least(1, data__seq_len=self.seq_len, data__batch_size=self.batch_size)
        at_least(1, data__shuffle_buffer=self.shuffle_buffer)
        at_least(0, data__eval_rows=self.eval_rows)
