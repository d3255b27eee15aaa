"""Sharded checkpoints that know neither ZeRO stage nor world size: safetensors and JSON, never pickles."""

from reformer_dist.checkpoint.reader import CheckpointReader, find_checkpoint, is_good, resolve_checkpoint
from reformer_dist.checkpoint.writer import write_checkpoint

__all__ = ["CheckpointReader", "find_checkpoint", "is_good", "resolve_checkpoint", "write_checkpoint"]
