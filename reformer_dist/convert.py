"""reformer-convert: converts models of other Reformer implementations to ours, and ours to Hugging Face's.

`reformer-convert SOURCE TARGET`
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from reformer_dist.checkpoint import RunRecord, write_export
from reformer_dist.config import DataConfig, RunConfig, TaskConfig, TaskKind, TrainerConfig
from reformer_dist.errors import CheckpointError
from reformer_dist.fs.atomic import make_staging, publish
from reformer_dist.fs.tensors import save_file
from reformer_dist.interop import hugging_face, reformer_pytorch, to_hugging_face, trax
from reformer_dist.interop.foreign import CONFIG_FILE, WEIGHTS_FILE, ForeignModel, ForeignOptions, HeadKind
from reformer_dist.interop.vocabulary import BYTES, find_tokenizer, hugging_face_files
from reformer_dist.process.command import run_command
from reformer_dist.process.version import add_version
from reformer_dist.run.compose import to_dict
from reformer_dist.run.pretrained import load_model

EPILOG = """\
sources:
  a directory of Hugging Face's transformers (config.json of model_type reformer, safetensors)
  one of reformer_pytorch: model.safetensors, and the arguments of ReformerLM in config.json
  one of Trax: model.weights.npy.gz or model.pkl.gz, and the arguments of ReformerLM in config.json
  a run directory, a checkpoint or an export of this package: written as a directory of transformers

examples:
  reformer-convert reformer-enwik8 outputs/enwik8
  reformer-generate outputs/enwik8 --prompt "In 1965, Brooks left IBM"
  reformer-convert outputs/mine for_transformers
"""

HEADS = {
    TaskKind.language_model: HeadKind.language_model,
    TaskKind.completion: HeadKind.language_model,
    TaskKind.masked_language_model: HeadKind.language_model,
    TaskKind.sequence_classification: HeadKind.sequence_classification,
    TaskKind.question_answering: HeadKind.question_answering,
}
MIN_LOGIT = -1e4  # of a token that is never predicted


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-convert",
        description="Converts models of other Reformer implementations to ours, and ours to Hugging Face's. "
        "No pickle is executed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("source", type=Path, help="directory of a model")
    parser.add_argument("target", type=Path, help="directory to write, which must not exist")
    parser.add_argument(
        "--tokenizer",
        help=f"vocabulary of a model whose directory has none: {', '.join(BYTES)} (from id 2, as in Trax), "
        "or a tokenizer.json or spiece.model",
    )
    return parser


def run_conversion(arguments: argparse.Namespace) -> None:
    """Detects the format of the source and converts it. Raises UserError."""
    source, target = arguments.source, arguments.target
    if target.exists():
        raise CheckpointError(f"{target}: exists; name a directory that does not")
    if not source.is_dir():
        raise CheckpointError(f"{source}: is not a directory; name the one with the model's files")
    model = _read_foreign(source)
    if model is None:
        _to_hugging_face(source, target)
    else:
        _from_foreign(model, source, target, arguments.tokenizer)


def _read_foreign(source: Path) -> ForeignModel | None:
    """The model of another implementation; None for one of ours, or if there is none."""
    path = source / CONFIG_FILE
    options = ForeignOptions.read(path) if path.is_file() else ForeignOptions(path, {})
    if "shapes" in options and "config" in options:
        return None
    if trax.is_trax(source):
        return trax.read(source)
    if not path.is_file():
        return None
    if "model_type" in options:
        return hugging_face.read(source)
    if "num_tokens" in options:
        return reformer_pytorch.read(source)
    raise CheckpointError(
        f"{path}: is of an unknown implementation; for transformers it has model_type, for reformer_pytorch "
        "the arguments of ReformerLM (num_tokens, ...), and for Trax a model.pkl.gz next to it"
    )


@dataclass(frozen=True)
class _ConvertedWeights:
    """A converted model as a WeightSource."""

    folder: Path
    record: RunRecord
    weights: dict[str, Tensor]
    extra_files: list[str]
    step: int = 0

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        return self.weights[name].flatten()[offset : offset + length]


def _from_foreign(model: ForeignModel, source: Path, target: Path, vocabulary: str | None) -> None:
    vocab_size = model.vocab_size - model.has_mask_token
    tokenizer = find_tokenizer(source, vocab_size, vocabulary)
    weights = with_mask_token(model) if model.is_masked and not model.has_mask_token else model.weights
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        specification = tokenizer.save(folder)
        record = RunRecord(
            config=to_dict(run_config(model)),
            tokenizer=specification,
            vocab_size=vocab_size,
            labels=model.classes,
            shapes={name: list(tensor.shape) for name, tensor in weights.items()},
        )
        files = sorted(path.name for path in folder.iterdir())
        write_export(_ConvertedWeights(folder, record, weights, files), target)
    n_parameters, kind = sum(tensor.numel() for tensor in weights.values()), _task_kind(model).name
    print(f"converted a {kind} of {model.system}, {n_parameters:,} parameters, to {target}")
    for note in model.notes:
        print(f"note: {note}")


def with_mask_token(model: ForeignModel) -> dict[str, Tensor]:
    """Weights with an added mask token, whose embedding is the mean of all. It is never predicted."""
    weights = dict(model.weights)
    table, head, bias = (weights[name] for name in ("embedding.tokens.weight", "head.weight", "head.bias"))
    weights["embedding.tokens.weight"] = torch.cat([table, table.mean(dim=0, keepdim=True)])
    weights["head.weight"] = torch.cat([head, torch.zeros_like(head[:1])])
    weights["head.bias"] = torch.cat([bias, torch.full_like(bias[:1], MIN_LOGIT)])
    return weights


def _task_kind(model: ForeignModel) -> TaskKind:
    return TaskKind.masked_language_model if model.is_masked else TaskKind[model.head.name]


def run_config(model: ForeignModel) -> RunConfig:
    """The configuration of a run with the model and its task, otherwise with the defaults."""
    kind, data, trainer = _task_kind(model), DataConfig(), TrainerConfig()
    max_positions = model.config.max_positions
    if max_positions is not None:
        data = replace(data, seq_len=min(data.seq_len, max_positions))
    if kind is not TaskKind.language_model:
        trainer = replace(trainer, sample_every=0)
    return RunConfig(task=TaskConfig(kind=kind), model=model.config, data=data, trainer=trainer)


def _to_hugging_face(source: Path, target: Path) -> None:
    loaded = load_model(source, [], torch.device("cpu"))
    kind, tokenizer, weights = loaded.config.task.kind, loaded.tokenizer, loaded.model.state_dict()
    if kind not in HEADS:
        raise CheckpointError(f"{source}: task.kind={kind.name}: transformers has no Reformer with such a head")
    n_rows = weights["embedding.tokens.weight"].shape[0]
    options, tensors = to_hugging_face.model_files(
        loaded.config.model, weights, n_rows, HEADS[kind], classes=loaded.task.labels, eos_id=tokenizer.eos_id
    )
    if kind is TaskKind.masked_language_model:
        options["mask_token_id"] = n_rows - 1
    partial = make_staging(target)
    save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    (partial / CONFIG_FILE).write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")
    hugging_face_files(tokenizer, partial)
    publish(partial, target)
    print(f"wrote {loaded.checkpoint} to {target}, which transformers reads as a {options['architectures'][0]}")


def main() -> None:
    run_command(lambda: run_conversion(build_parser().parse_args()))


if __name__ == "__main__":
    main()
