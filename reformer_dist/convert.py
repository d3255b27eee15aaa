"""Entry: models of other Reformers to ours, and ours to Hugging Face's. `reformer-convert SOURCE TARGET`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reformer_dist.checkpoint import write_export
from reformer_dist.cli import run_command
from reformer_dist.compose import plain
from reformer_dist.config import DataConfig, RunConfig
from reformer_dist.data import Tokenizer
from reformer_dist.errors import CheckpointError
from reformer_dist.interop import hugging_face, reformer_pytorch, to_hugging_face, trax
from reformer_dist.interop.foreign import CONFIG_FILE, WEIGHTS_FILE, ForeignModel, Options
from reformer_dist.interop.vocabulary import BYTES, find_tokenizer, hugging_face_files
from reformer_dist.load import load_model

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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-convert",
        description="Brings models of other Reformers, and takes ours to Hugging Face's. No pickle is executed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the folder of a model")
    parser.add_argument("target", type=Path, help="the folder to write, which must not exist")
    parser.add_argument(
        "--tokenizer",
        help=f"the model's vocabulary, where its folder holds none: {', '.join(BYTES)} (from id 2, as Trax has "
        "them), or a tokenizer.json or spiece.model",
    )
    return parser


def run_conversion(arguments: argparse.Namespace) -> None:
    """Finds out what the source is and converts it. Raises UserError."""
    source, target = arguments.source, arguments.target
    if target.exists():
        raise CheckpointError(f"{target}: exists; name a folder that does not")
    if not source.is_dir():
        raise CheckpointError(f"{source}: is no folder; name the folder that holds the model's files")
    if _is_ours(source):
        _to_hugging_face(source, target)
    else:
        _from_foreign(_read_foreign(source), source, target, arguments.tokenizer)


def _is_ours(source: Path) -> bool:
    path = source / CONFIG_FILE
    if not path.is_file():
        return not trax.is_trax(source)  # a run or a checkpoint, or nothing: loading tells
    options = Options.read(path)
    return "shapes" in options and "config" in options


def _read_foreign(source: Path) -> ForeignModel:
    if trax.is_trax(source):
        return trax.read(source)
    options = Options.read(source / CONFIG_FILE)
    if "model_type" in options:
        return hugging_face.read(source)
    if "num_tokens" in options:
        return reformer_pytorch.read(source)
    raise CheckpointError(
        f"{options.path}: is of no known system: a model of transformers has model_type in it, one of "
        "reformer_pytorch the arguments of ReformerLM (num_tokens, ...); Trax has model.pkl.gz beside it"
    )


@dataclass(frozen=True)
class _Loose:
    """A converted model as `write_export` reads a checkpoint."""

    folder: Path
    run: dict[str, Any]
    weights: dict[str, Tensor]
    extra_files: list[str]
    step: int = 0

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        return self.weights[name].flatten()[offset : offset + length]


def _from_foreign(model: ForeignModel, source: Path, target: Path, named: str | None) -> None:
    tokenizer = find_tokenizer(source, model.vocab_size, named)
    with tempfile.TemporaryDirectory() as scratch:
        specification = tokenizer.save(Path(scratch))
        run = {
            "config": plain(run_config(model)),
            "tokenizer": specification,
            "vocab_size": model.vocab_size,
            "shapes": {name: list(tensor.shape) for name, tensor in model.weights.items()},
        }
        files = sorted(path.name for path in Path(scratch).iterdir())
        write_export(_Loose(Path(scratch), run, model.weights, files), target)
    n_parameters = sum(tensor.numel() for tensor in model.weights.values())
    print(f"converted a {model.head.name} of {model.system}, {n_parameters:,} parameters, to {target}")
    for note in model.notes:
        print(f"note: {note}")


def run_config(model: ForeignModel) -> RunConfig:
    """A run with that model; all that is not the model's is at its default."""
    data = DataConfig()
    longest = model.config.max_positions
    if longest is not None:
        data = replace(data, seq_len=min(data.seq_len, longest))
    return RunConfig(model=model.config, data=data)


def _to_hugging_face(source: Path, target: Path) -> None:
    loaded = load_model(source, [], torch.device("cpu"))
    tokenizer: Tokenizer = loaded.tokenizer
    options, tensors = to_hugging_face.model_files(
        loaded.config.model, loaded.model.state_dict(), tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    (partial / CONFIG_FILE).write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")
    hugging_face_files(tokenizer, partial)
    partial.rename(target)
    print(f"wrote {loaded.checkpoint} to {target}, which transformers reads as a {options['architectures'][0]}")


def main() -> None:
    run_command(lambda: run_conversion(build_parser().parse_args()))


if __name__ == "__main__":
    main()
