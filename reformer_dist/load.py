"""A trained model from its checkpoint, ready to use: no DeepSpeed, no training data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reformer_dist.checkpoint import CheckpointReader, Export, resolve_checkpoint
from reformer_dist.checkpoint.export import CONFIG_FILE as EXPORTED
from reformer_dist.compose import run_config_from
from reformer_dist.config import RunConfig, TaskKind
from reformer_dist.data import Tokenizer, load_tokenizer
from reformer_dist.errors import CheckpointError
from reformer_dist.models import ReformerLM
from reformer_dist.runnable import require_attention
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
            return self.task.begin(self.model, prompts)
        return self.language_model, prompts


def load_model(path: Path, overrides: list[str], device: torch.device) -> LoadedModel:
    """Loads from a run directory (its newest good checkpoint) a checkpoint, or an export.

    overrides: key=value, such as model.n_hashes=8, for what the weights leave free. Raises CheckpointError
    where there is no good checkpoint or the overrides make another model of it, and ConfigError.
    """
    reader = open_weights(path)
    # how many ranks shared a sequence in training, and on what, is of no matter here
    saved = {key: value for key, value in reader.run["config"].items() if key != "parallel"}
    saved["model"] = {key: value for key, value in saved["model"].items() if key != "attention_implementation"}
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


def open_weights(path: Path) -> CheckpointReader | Export:
    """Of a run directory (its newest good checkpoint), a checkpoint, or an export. Raises CheckpointError."""
    is_export = (path / EXPORTED).is_file()
    return Export(path) if is_export else CheckpointReader(resolve_checkpoint(path))
