"""Datasets, rows and batches, and what happens to damaged samples."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from reformer_dist.config.checks import ConfigGroup, bounded, require


class Strand(Enum):
    forward = "forward"
    """Sequences as they were written."""
    random = "random"
    """Each training row from one of the strands; held-out rows as they were written."""
    reverse = "reverse"
    """All rows from the other strand."""


@dataclass(kw_only=True)
class DataConfig(ConfigGroup, prefix="data."):
    """Datasets written by reformer-shards, and how they are split into rows."""

    path: Any = "data/quickstart"
    """Directory with dataset.json and the shards, local or at an http(s): or s3: URL; or a list of directories."""
    weights: list[float] | None = None
    """Relative number of rows from each dataset of path; null pools their shards as if they were one dataset."""
    seq_len: int = bounded(1024, least=2)  # the first token of a text row is only a label of the previous row
    """Tokens per row, at least 2; one more is read for the last label."""
    batch_size: int = bounded(8, least=1)
    """Rows per optimizer step, over all ranks."""
    epochs: int = bounded(0, least=0)
    """The run ends after this many passes over the data, if trainer.max_steps did not end it; 0: no limit."""
    shuffle: bool = True
    """Shuffle shards and samples anew for every epoch; false: read them in the order they were written in."""
    mask_document_starts: bool = False
    """No loss for the first token of a document, which the previous document in the row does not predict."""
    mask_documents: bool = False
    """Text: tokens attend to those of their own document only, not to other documents in the row."""
    reset_position_ids: bool = False
    """With mask_documents: the positions of each document in a row count from 0."""
    pack_samples: bool = False
    """completion: a row holds as many samples as fit into seq_len, which do not see one another; false: one."""
    strand: Strand = Strand.forward
    """DNA of reformer-shards --fasta: the strand that rows are read from, forward, random or reverse."""
    workers: int = bounded(1, least=0, most=1024)
    """Prefetch threads per rank; 0 reads between steps."""
    max_damaged_fraction: float = bounded(0.01, least=0, below=1)
    """Damaged samples are skipped; the run stops if they exceed this fraction of all samples."""
    skip_steps: Any = None
    """[from, to], or a list of such pairs: the rows of these steps are read, but not trained on."""
    accept_changed: bool = False
    """Resume although the data changed since the run began; the current epoch starts over."""
    cache_dir: str | None = None
    """Directory of copies of remote shards, shared by the processes of a machine; null: ~/.cache/reformer_dist."""
    cache_gb: float = bounded(50.0, above=0, most=2**30)
    """Size limit of cache_dir in GiB; the least recently used shards are deleted first."""
    retry_seconds: float = bounded(600.0, least=0)
    """Seconds for which requests to a remote source that does not respond are retried, before the run saves and
    exits with status 75. At most half of parallel.timeout, since the other ranks wait too."""
    eval_rows: int = bounded(64, least=0)
    """Held-out rows per evaluation during training, spread evenly over the held-out text; 0 means all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        paths = self.paths()
        self.skipped_ranges()
        require(self.cache_dir != "", "data.cache_dir", "''", "must name a directory")
        requirement = "needs data.mask_documents=true: positions restart where a document does"
        resets = self.reset_position_ids and not self.mask_documents
        require(not resets, "data.reset_position_ids", True, requirement)
        if self.weights is not None:
            requirement = f"must be {len(paths)} numbers above 0, one for each dataset of data.path"
            is_valid = len(self.weights) == len(paths) and all(0 < w < float("inf") for w in self.weights)
            require(is_valid, "data.weights", self.weights, requirement)
            requirement = "must be 0 with data.weights: datasets end at different times; use trainer.max_steps"
            require(self.epochs == 0, "data.epochs", self.epochs, requirement)

    def skipped_ranges(self) -> list[range]:
        """The steps of skip_steps, counted from 1. Raises ConfigError."""
        if self.skip_steps is None:
            return []
        pairs = self.skip_steps if isinstance(self.skip_steps, list | tuple) else [self.skip_steps]
        if pairs and not any(isinstance(pair, list | tuple) for pair in pairs):
            pairs = [pairs]
        requirement = "must be [from, to] with 1 <= from <= to, or a list of such pairs"
        for pair in pairs:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(step) is int for step in pair)
            require(is_pair and 1 <= pair[0] <= pair[1], "data.skip_steps", self.skip_steps, requirement)
        return [range(first, last + 1) for first, last in pairs]

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether rows hold several documents or samples that do not see one another."""
        return self.mask_documents or self.pack_samples

    def paths(self) -> list[str]:
        """Directories and URLs of all datasets."""
        paths = self.path if isinstance(self.path, list) else [self.path]
        is_valid = bool(paths) and all(isinstance(path, str) and path for path in paths)
        require(is_valid, "data.path", self.path, "must be a directory or URL, or a list of them")
        return [str(path) for path in paths]
