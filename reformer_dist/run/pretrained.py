"""Loads trained models from checkpoints and exports, without DeepSpeed and training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reformer_dist.checkpoint.export import open_weights
from reformer_dist.config import RunConfig, TaskKind
from reformer_dist.data import Tokenizer, load_tokenizer
from reformer_dist.errors import CheckpointError, DataError
from reformer_dist.models import ReformerLM
from reformer_dist.models.attention import check_attention_backend
from reformer_dist.process.log import logger
from reformer_dist.run.compose import run_config_from
from reformer_dist.tasks import SequenceToSequence, Task, make_task


@dataclass(frozen=True)
class LoadedModel:
    model: nn.Module
    """In evaluation mode, float32, on the requested device."""
    task: Task
    config: RunConfig
    """Of the training run, with overrides applied."""
    tokenizer: Tokenizer
    checkpoint: Path
    step: int

    @property
    def language_model(self) -> ReformerLM:
        """The model, if it can continue a text. Raises CheckpointError otherwise."""
        kind = self.config.task.kind
        if kind in (TaskKind.language_model, TaskKind.completion) and isinstance(self.model, ReformerLM):
            return self.model
        requirement = "only language_model and completion continue a text; see reformer-evaluate"
        raise CheckpointError(f"{self.checkpoint}: task.kind={kind.name}: {requirement}")

    def begin(self, prompts: list[Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """Returns (model, prefixes to decode from) for prompts [S], each beginning with an end-of-text token.

        Prompts of sequence_to_sequence are sources, which the returned model has encoded. Raises CheckpointError.
        """
        if isinstance(self.task, SequenceToSequence):
            return self.task.condition(self.model, prompts)
        return self.language_model, prompts


def load_model(path: Path, overrides: list[str], device: torch.device) -> LoadedModel:
    """Loads a run directory (its newest intact checkpoint), a checkpoint or an export.

    overrides: key=value, such as model.n_hashes=8, for settings that do not change the weights. Raises
    ConfigError, and CheckpointError if there is no intact checkpoint or the overrides change its parameters.
    """
    reader = open_weights(path)
    # sequence parallelism and attention backend are those of this machine, not of training
    saved = {key: value for key, value in reader.record.config.items() if key != "parallel"}
    saved["model"] = {key: value for key, value in saved["model"].items() if key != "attention_backend"}
    config = run_config_from(saved, overrides)
    check_attention_backend(config.model, device)
    tokenizer = load_tokenizer(reader.record.tokenizer, reader.folder)
    if tokenizer.vocab_size != reader.record.vocab_size:
        requirement = f"the model was trained with one of {reader.record.vocab_size}; restore its own tokenizer"
        raise CheckpointError(f"{reader.folder}: its tokenizer has {tokenizer.vocab_size} tokens; {requirement}")
    task = make_task(config, tokenizer, reader.record.labels)
    model = task.build_model()
    reader.load_weights(model)
    return LoadedModel(model.to(device).eval(), task, config, tokenizer, reader.folder, reader.step)


HEAD_PREFIX, TOKEN_EMBEDDING = "head.", "embedding.tokens"


def load_initial_weights(path: str, model: nn.Module, tokenizer: dict[str, Any]) -> None:
    """Fills a model from a checkpoint, run or export; a head of another kind keeps its random initialization.

    tokenizer: specification of the data's tokenizer. Raises CheckpointError, and DataError if the model's differs.
    """
    reader = open_weights(Path(path))
    if reader.record.tokenizer != tokenizer:
        fix = f"write the data with tools/make_shards.py --tokenizer-of {path}"
        raise DataError(f"data.path: has another tokenizer than init_from={path}; {fix}")
    shapes = reader.record.shapes
    head = {name: list(p.shape) for name, p in model.named_parameters() if name.startswith(HEAD_PREFIX)}
    saved_head = {name: shape for name, shape in shapes.items() if name.startswith(HEAD_PREFIX)}
    ignored: dict[str, list[int]] = {}
    if head != saved_head:
        logger.info(f"the head of {reader.folder} is of another kind; this run's keeps its initialization")
        children = model.named_children()
        model = nn.ModuleDict({name: child for name, child in children if f"{name}." != HEAD_PREFIX})
        ignored = saved_head
    with _resized_embedding(model, shapes):
        reader.load_weights(model, ignored)
    logger.info(f"initialized from {reader.folder}")


@contextmanager
def _resized_embedding(model: nn.Module, shapes: dict[str, list[int]]) -> Iterator[None]:
    """Resizes the token embedding to load its saved rows, if only one of the two models has a mask token.

    On exit, the common rows are the saved ones; a new mask token is their mean.
    """
    embedding = model.get_submodule(TOKEN_EMBEDDING)
    weight = embedding.weight
    assert isinstance(weight, nn.Parameter)
    n_saved = shapes.get(f"{TOKEN_EMBEDDING}.weight", [len(weight)])[0]
    if abs(n_saved - len(weight)) != 1:
        yield
        return
    embedding.weight = saved = nn.Parameter(weight.new_empty(n_saved, weight.shape[1]))
    yield
    with torch.no_grad():
        n_common = min(n_saved, len(weight))
        weight[:n_common] = saved[:n_common]
        weight[n_common:] = saved.mean(dim=0)
    embedding.weight = weight
