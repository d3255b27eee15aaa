"""Sharded checkpoints that know neither ZeRO stage nor world size: safetensors and JSON, never pickles."""

from reformer_dist.checkpoint.export import Export, WeightSource, write_export
from reformer_dist.checkpoint.reader import CheckpointReader, find_checkpoint, is_good, resolve_checkpoint
from reformer_dist.checkpoint.writer import Saving, prune

__all__ = [
    "CheckpointReader",
    "Export",
    "Saving",
    "WeightSource",
    "find_checkpoint",
    "is_good",
    "prune",
    "resolve_checkpoint",
    "write_export",
]
