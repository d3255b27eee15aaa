"""Starting a run from weights that are there already: fine-tuning (`init_from`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from reformer_dist.checkpoint import CheckpointReader, Export
from reformer_dist.errors import DataError
from reformer_dist.load import open_weights
from reformer_dist.log import logger

HEAD = "head."


def saved_model(path: str) -> dict[str, Any]:
    """model.* of the weights to start from. Raises CheckpointError."""
    saved: dict[str, Any] = dict(open_weights(Path(path)).run["config"]["model"])
    saved.pop("attention_implementation", None)  # what it ran on is of no matter here
    return saved


def start_from(path: str, model: nn.Module, tokenizer: dict[str, Any]) -> None:
    """Fills a model with the weights of a checkpoint, a run or an export; a head of another kind starts anew.

    tokenizer: specification of that of the data. Raises CheckpointError, and DataError where it is not theirs.
    """
    reader = open_weights(Path(path))
    if reader.run["tokenizer"] != tokenizer:
        fix = f"write the data with tools/make_shards.py --tokenizer-of {path}"
        raise DataError(f"data.path: has another tokenizer than init_from={path}; {fix}")
    reader.load_weights(_without_other_head(reader, model))
    logger.info(f"weights are those of {reader.folder}")


def _without_other_head(reader: CheckpointReader | Export, model: nn.Module) -> nn.Module:
    """The model, or what is below its head where that is of another kind than the one saved."""
    shapes: dict[str, list[int]] = reader.run["shapes"]
    ours = {name: list(p.shape) for name, p in model.named_parameters() if name.startswith(HEAD)}
    theirs = {name: shape for name, shape in shapes.items() if name.startswith(HEAD)}
    if ours == theirs:
        return model
    logger.info(f"the head of {reader.folder} is of another kind; this run's starts anew")
    reader.run["shapes"] = {name: shape for name, shape in shapes.items() if name not in theirs}
    return nn.ModuleDict({name: part for name, part in model.named_children() if not f"{name}.".startswith(HEAD)})
