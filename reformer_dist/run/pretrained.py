"""Loads trained models from checkpoints and exports, without DeepSpeed and training data."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from reformer_dist.checkpoint import CheckpointReader, RunRecord, WeightChoice
from reformer_dist.checkpoint.export import open_weights
from reformer_dist.config import RunConfig, TaskKind
from reformer_dist.config.stage_values import saved_in_force
from reformer_dist.data import Tokenizer, load_tokenizer
from reformer_dist.engine import TrainEngine
from reformer_dist.errors import CheckpointError, ConfigError, DataError
from reformer_dist.models import ReformerLM
from reformer_dist.models.attention import check_attention_backend
from reformer_dist.process.log import logger
from reformer_dist.run.compose import run_config_from
from reformer_dist.tasks import SequenceToSequence, Task, make_task

NOT_OF_A_MODEL = ("launcher", "sweep", "stages")  # groups of keys


@dataclass(frozen=True)
class LoadedModel:
    model: nn.Module
    """In evaluation mode, float32, on the requested device."""
    task: Task
    config: RunConfig
    """Of the training run, in its last stage so far, with overrides applied."""
    tokenizer: Tokenizer
    checkpoint: Path
    step: int
    fields: list[str] = field(default_factory=list)
    """Of a training sample, as in RunRecord."""

    @property
    def prompt_end(self) -> list[int]:
        """Token ids between a prompt and its continuation: an end-of-text if these were two fields in training."""
        is_pair = self.config.task.kind is TaskKind.completion and len(self.fields) == 2
        return [self.tokenizer.eos_id] if is_pair else []

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


def load_model(
    path: Path, overrides: list[str], device: torch.device, choice: WeightChoice | None = None
) -> LoadedModel:
    """Loads a run directory (its newest intact checkpoint), a checkpoint or an export.

    choice: of the weights of a run. overrides: key=value, such as model.n_hashes=8, for settings that do not
    change the weights. Raises ConfigError, and CheckpointError if there is no intact checkpoint or the overrides
    change its parameters.
    """
    for word in overrides:
        if word.partition("=")[0].lstrip("+").partition(".")[0] in NOT_OF_A_MODEL:
            raise ConfigError(f"{word}: has no effect on a trained model; leave it out")
    reader = open_weights(path, choice)
    # sequence parallelism and attention backend are those of this machine, not of training
    in_force = saved_in_force(reader.record.config, reader.step)
    saved = {key: value for key, value in in_force.items() if key != "parallel"}
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
    fields = reader.record.fields
    if config.task.kind is TaskKind.completion and not fields:
        logger.warning(
            f"{reader.folder}: does not record whether its samples were one text or prompt and completion; prompts"
            " are read as beginnings of one text (a checkpoint of the resumed run records it)"
        )
    return LoadedModel(model.to(device).eval(), task, config, tokenizer, reader.folder, reader.step, fields)


def add_weight_choice(parser: ArgumentParser) -> None:
    """Adds the options of `weight_choice` to a command."""
    parser.add_argument("--average", action="store_true", help="use the average of the weights (optim.average)")
    parser.add_argument("--best", action="store_true", help="use the best checkpoint (trainer.keep_best)")


def weight_choice(arguments: Namespace) -> WeightChoice:
    return WeightChoice(averaged=arguments.average, best=arguments.best)


HEAD_PREFIX, TOKEN_EMBEDDING = "head.", "embedding.tokens"


def load_initial_weights(path: str, model: nn.Module, record: RunRecord) -> RunRecord:
    """Fills a model from a checkpoint, run or export, and returns the record of that.

    record: of the run with the model. A head that predicts something else is not taken over. Every weight that is
    left out, or keeps its random initialization, is logged by name. Raises ConfigError if the new model would read
    the weights differently, CheckpointError if their shapes differ, and DataError if the tokenizers differ.
    """
    reader = open_weights(Path(path))
    saved, shapes = reader.record, reader.record.shapes
    if saved.tokenizer != record.tokenizer:
        fix = f"write the data with reformer-shards --tokenizer-of {path}"
        raise DataError(f"data.path: has another tokenizer than init_from={path}; {fix}")
    _check_tie(path, saved, record)
    ignored: set[str] = set()
    if _prediction(saved) != _prediction(record):
        ignored = {name for name in shapes if name.startswith(HEAD_PREFIX)}
        initial = [name for name, _ in model.named_parameters() if name.startswith(HEAD_PREFIX)]
        logger.warning(
            f"init_from={path}: its head predicts {_prediction(saved)}, not {_prediction(record)}: "
            f"{', '.join(sorted(ignored))} are not used, and {', '.join(initial)} start at random"
        )
        children = model.named_children()
        model = nn.ModuleDict({name: child for name, child in children if f"{name}." != HEAD_PREFIX})
    with _resized_embedding(model, shapes):
        reader.load_weights(model, ignored)
    logger.info(f"initialized from {reader.folder}")
    return saved


def load_initial_moments(path: str, engine: TrainEngine, record: RunRecord) -> None:
    """Fills the optimizer's moments from a checkpoint or run.

    record: of the run with the engine. Raises CheckpointError unless there are moments of every trained parameter.
    """
    reader = open_weights(Path(path))
    key = f"init_moments=true: init_from={path}"
    if not isinstance(reader, CheckpointReader):
        raise CheckpointError(f"{key} is an export, which holds no moments; name a run or checkpoint")
    require_same_optimizer(reader, record)
    if _prediction(reader.record) != _prediction(record):
        raise CheckpointError(f"{key} has another head, and so no moments of this one's parameters")
    reader.check_shapes(record.shapes)
    engine.load_moments(reader)


def require_same_optimizer(checkpoint: CheckpointReader, record: RunRecord) -> None:
    """Raises CheckpointError if a checkpoint holds the state of another optimizer than a run has."""
    saved, kind = (each.config["optim"].get("kind", "adamw") for each in (checkpoint.record, record))
    if saved != kind:
        fix = "go on with that, or begin another run from its weights, with init_from"
        raise CheckpointError(f"optim.kind={kind}: {checkpoint.folder} holds the state of {saved}; {fix}")


def _check_tie(path: str, saved: RunRecord, record: RunRecord) -> None:
    """Refuses another tie: a tied table is scaled where it embeds tokens, and an untied one is not."""
    ties, tied = (bool(each.config["model"].get("tie_embeddings")) for each in (record, saved))
    if ties and not tied:
        problem = "has a head with weights of its own, which would be lost; must be false"
    else:
        problem = "has one table for its embedding and its head, scaled for both; must be true"
    if ties != tied:
        raise ConfigError(f"model.tie_embeddings={str(ties).lower()}: init_from={path} {problem}, as there")


def _prediction(record: RunRecord) -> str:
    """What the head of a model predicts. Heads that predict the same are interchangeable."""
    kind = TaskKind[record.config["task"]["kind"]]
    if kind is TaskKind.sequence_classification:
        return f"the classes {', '.join(record.labels)}"
    others = {TaskKind.masked_language_model: "masked tokens", TaskKind.question_answering: "spans"}
    return others.get(kind, "next tokens")


@contextmanager
def _resized_embedding(model: nn.Module, shapes: dict[str, list[int]]) -> Iterator[None]:
    """Resizes the token embedding to load its saved rows, if only one of the two models has a mask token.

    On exit, the common rows are the saved ones; a new mask token is their mean. Either difference is logged.
    """
    embedding = model.get_submodule(TOKEN_EMBEDDING)
    weight = embedding.weight
    assert isinstance(weight, nn.Parameter)
    n_saved = shapes.get(f"{TOKEN_EMBEDDING}.weight", [len(weight)])[0]
    if abs(n_saved - len(weight)) != 1:
        yield
        return
    change = "the mask token starts as the mean" if n_saved < len(weight) else "the mask token's is not used"
    logger.info(f"{TOKEN_EMBEDDING}.weight: {n_saved} -> {len(weight)} rows: {change}")
    embedding.weight = saved = nn.Parameter(weight.new_empty(n_saved, weight.shape[1]))
    yield
    with torch.no_grad():
        n_common = min(n_saved, len(weight))
        weight[:n_common] = saved[:n_common]
        weight[n_common:] = saved.mean(dim=0)
    embedding.weight = weight
