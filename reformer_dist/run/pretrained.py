"""A trained model from its checkpoint, ready to use: no DeepSpeed, no training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reformer_dist.checkpoint import CheckpointReader, Export
from reformer_dist.checkpoint.weights import open_weights
from reformer_dist.config import RunConfig, TaskKind
from reformer_dist.data import Tokenizer, load_tokenizer
from reformer_dist.errors import CheckpointError, DataError
from reformer_dist.models import ReformerLM
from reformer_dist.models.attention import require_attention
from reformer_dist.process.log import logger
from reformer_dist.run.compose import run_config_from
from reformer_dist.tasks import SequenceToSequence, Task, make_task


@dataclass(frozen=True)
class LoadedModel:
    model: nn.Module
    """Of its task's kind, in evaluation mode, float32, on the device asked for."""
    task: Task
    config: RunConfig
    """Of the training run, with the overrides."""
    tokenizer: Tokenizer
    checkpoint: Path
    step: int

    @property
    def language_model(self) -> ReformerLM:
        """The model, if it is one that goes on from a text. Raises CheckpointError."""
        kind = self.config.task.kind
        if kind in (TaskKind.language_model, TaskKind.completion) and isinstance(self.model, ReformerLM):
            return self.model
        right = "what goes on from a text is a language_model or a completion; see reformer-evaluate"
        raise CheckpointError(f"{self.checkpoint}: its task.kind is {kind.name}; {right}")

    def begin(self, prompts: list[Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """(model, what it goes on from) for prompts [S], each an end of text and what follows it.

        Of a sequence_to_sequence model they are sources, which it has read by then. Raises CheckpointError.
        """
        if isinstance(self.task, SequenceToSequence):
            return self.task.condition(self.model, prompts)
        return self.language_model, prompts


def load_model(path: Path, overrides: list[str], device: torch.device) -> LoadedModel:
    """Loads from a run directory (its newest good checkpoint) a checkpoint, or an export.

    overrides: key=value, such as model.n_hashes=8, for what the weights leave free. Raises CheckpointError
    where there is no good checkpoint or the overrides make another model of it, and ConfigError.
    """
    reader = open_weights(path)
    # how many ranks shared a sequence in training, and on what, is of no matter here
    saved = {key: value for key, value in reader.run["config"].items() if key != "parallel"}
    saved["model"] = {key: value for key, value in saved["model"].items() if key != "attention_backend"}
    config = run_config_from(saved, overrides)
    require_attention(config.model, device)
    tokenizer = load_tokenizer(reader.run["tokenizer"], reader.folder)
    _require_vocabulary(reader, tokenizer)
    task = make_task(config, tokenizer, reader.run.get("labels", ()))
    model = task.build_model()
    reader.load_weights(model)
    return LoadedModel(model.to(device).eval(), task, config, tokenizer, reader.folder, reader.step)


def _require_vocabulary(reader: CheckpointReader | Export, tokenizer: Tokenizer) -> None:
    expected = reader.run["vocab_size"]
    if tokenizer.vocab_size != expected:
        right = f"the model was trained with one of {expected}; bring its own tokenizer back"
        raise CheckpointError(f"{reader.folder}: its tokenizer has {tokenizer.vocab_size} tokens; {right}")


HEAD, TABLE = "head.", "embedding.tokens"


def load_initial_weights(path: str, model: nn.Module, tokenizer: dict[str, Any]) -> None:
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
