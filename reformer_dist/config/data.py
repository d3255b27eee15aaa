"""What the model reads: the data sets, the length of a row, the rows of a step, and what happens to bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from reformer_dist.config.checks import at_least, check_types, is_share, require


@dataclass(kw_only=True)
class DataConfig:
    """Data sets written by tools/make_shards.py and how they are cut into rows."""

    path: Any = "data/quickstart"
    """Folder that holds dataset.json and the shards, here or behind http(s): or s3:; or a list of such folders."""
    weights: list[float] | None = None
    """Rows drawn from each data set of path, in any unit; null pools their shards as if of one data set."""
    seq_len: int = 1024
    """Tokens of a row that the model sees, 2 at least; one more is read for the last label."""
    batch_size: int = 8
    """Rows of one optimizer step, over all ranks."""
    epochs: int = 0
    """Passes over the data after which the run ends, if trainer.max_steps did not end it; 0: no end."""
    shuffle: bool = True
    """Draw the order of shards and of the samples of each anew for every pass; false: as they were written."""
    mask_document_starts: bool = False
    """Don't ask for the first token of a document, which the document before it in the row does not tell."""
    workers: int = 1
    """Threads of a rank that read ahead; 0 reads between steps."""
    max_damaged_fraction: float = 0.01
    """Damaged samples are passed over; the run stops where they are more than this share of all."""
    accept_changed: bool = False
    """Resume although the data are not those that the run began with; the pass that was begun starts anew."""
    cache_dir: str | None = None
    """Folder for copies of remote shards, shared by all processes of a machine; null: ~/.cache/reformer_dist."""
    cache_gb: float = 50.0
    """GiB of it; what was used longest ago makes room."""
    eval_rows: int = 64
    """Held-out rows of one evaluation during training; 0 means all of them."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        self.paths()
        at_least(2, data__seq_len=self.seq_len)  # a text sample goes on from a row without its first token
        at_least(1, data__batch_size=self.batch_size)
        at_least(0, data__eval_rows=self.eval_rows, data__epochs=self.epochs, data__workers=self.workers)
        is_share(data__max_damaged_share=self.max_damaged_fraction)
        require(0 < self.cache_gb < math.inf, "data.cache_gb", self.cache_gb, "must be above 0 and finite")
        require(self.cache_dir != "", "data.cache_dir", "''", "must name a folder")
        if self.weights is not None:
            n_paths = len(self.paths())
            right = f"must be {n_paths} numbers above 0, one for each data set of data.path"
            fits = len(self.weights) == n_paths and all(0 < weight < float("inf") for weight in self.weights)
            require(fits, "data.weights", self.weights, right)
            right = (
                "must be 0 with data.weights, under which data sets end at different times; see trainer.max_steps"
            )
            require(self.epochs == 0, "data.epochs", self.epochs, right)

    def paths(self) -> list[str]:
        """Folders and URLs of all data sets."""
        found = self.path if isinstance(self.path, list) else [self.path]
        fits = bool(found) and all(isinstance(path, str) and path for path in found)
        require(fits, "data.path", self.path, "must be a folder or URL, or a list of them")
        return [str(path) for path in found]
