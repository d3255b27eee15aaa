"""Opens the weights of a run directory, a checkpoint or an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reformer_dist.checkpoint.export import CONFIG_FILE, Export
from reformer_dist.checkpoint.reader import CheckpointReader, resolve_checkpoint


def open_weights(path: Path) -> CheckpointReader | Export:
    """Opens a run directory (its newest intact checkpoint), a checkpoint, or an export. Raises CheckpointError."""
    is_export = (path / CONFIG_FILE).is_file()
    return Export(path) if is_export else CheckpointReader(resolve_checkpoint(path))


def saved_model_config(path: str) -> dict[str, Any]:
    """model.* of the weights to start from, without the attention backend. Raises CheckpointError."""
    saved: dict[str, Any] = dict(open_weights(Path(path)).record.config["model"])
    saved.pop("attention_backend", None)
    return saved
