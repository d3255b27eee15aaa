"""A trained model from its checkpoint, ready to use: no DeepSpeed, no training data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from reformer_dist.checkpoint import CheckpointReader, Export, resolve_checkpoint
from reformer_dist.checkpoint.export import CONFIG_FILE as EXPORTED
from reformer_dist.compose import run_config_from
from reformer_dist.config import RunConfig
from reformer_dist.data import Tokenizer, load_tokenizer
from reformer_dist.models import ReformerLM
from reformer_dist.runnable import require_attention


@dataclass(frozen=True)
class LoadedModel:
    model: ReformerLM
    """In evaluation mode, float32, on the device asked for."""
    config: RunConfig
    """Of the training run, with the overrides."""
    tokenizer: Tokenizer
    checkpoint: Path
    step: int


def load_model(path: Path, overrides: list[str], device: torch.device) -> LoadedModel:
    """Loads from a run directory (its newest good checkpoint) a checkpoint, or an export.

    overrides: key=value, such as model.n_hashes=8, for what the weights leave free. Raises CheckpointError
    where there is no good checkpoint or the overrides make another model of it, and ConfigError.
    """
    reader = _open(path)
    # how many ranks shared a sequence in training, and on what, is of no matter here
    saved = {key: value for key, value in reader.run["config"].items() if key != "parallel"}
    saved["model"] = {key: value for key, value in saved["model"].items() if key != "attention_implementation"}
    config = run_config_from(saved, overrides)
    require_attention(config.model, device)
    model = ReformerLM(config.model, reader.run["vocab_size"], config.trainer.seed)
    reader.load_weights(model)
    tokenizer = load_tokenizer(reader.run["tokenizer"], reader.folder)
    return LoadedModel(model.to(device).eval(), config, tokenizer, reader.folder, reader.step)


def _open(path: Path) -> CheckpointReader | Export:
    is_export = (path / EXPORTED).is_file()
    return Export(path) if is_export else CheckpointReader(resolve_checkpoint(path))
