"""Sharded checkpoints independent of ZeRO stage and world size: safetensors and JSON, no pickles."""

from reformer_dist.checkpoint.async_save import AsyncSave, prune
from reformer_dist.checkpoint.export import Export, WeightChoice, WeightSource, write_export
from reformer_dist.checkpoint.fragment import Fragment
from reformer_dist.checkpoint.reader import (
    CheckpointReader,
    checkpoint_problem,
    find_checkpoint,
    resolve_checkpoint,
)
from reformer_dist.checkpoint.record import RunRecord

__all__ = [
    "AsyncSave",
    "CheckpointReader",
    "Export",
    "Fragment",
    "RunRecord",
    "WeightChoice",
    "WeightSource",
    "checkpoint_problem",
    "find_checkpoint",
    "prune",
    "resolve_checkpoint",
    "write_export",
]
