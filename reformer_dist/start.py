"""Starting a run from weights that are there already: fine-tuning (`init_from`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reformer_dist.checkpoint import CheckpointReader, Export
from reformer_dist.errors import DataError
from reformer_dist.load import open_weights
from reformer_dist.log import logger

HEAD, TABLE = "head.", "embedding.tokens"


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
    part = _without_other_head(reader, model)
    with _table_as_saved(part, reader.run["shapes"]):
        reader.load_weights(part)
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


@contextmanager
def _table_as_saved(model: nn.Module, shapes: dict[str, list[int]]) -> Iterator[None]:
    """Meanwhile the table of tokens has the row more, or less, that a masked language model has for its mask.

    After that, all other rows are those saved; a mask that is new begins as their mean.
    """
    embedding = model.get_submodule(TABLE)
    own = embedding.weight
    assert isinstance(own, nn.Parameter)
    n_saved = shapes.get(f"{TABLE}.weight", [len(own)])[0]
    if abs(n_saved - len(own)) != 1:
        yield
        return
    embedding.weight = saved = nn.Parameter(own.new_empty(n_saved, own.shape[1]))
    yield
    with torch.no_grad():
        n_shared = min(n_saved, len(own))
        own[:n_shared] = saved[:n_shared]
        own[n_shared:] = saved.mean(dim=0)
    embedding.weight = own
