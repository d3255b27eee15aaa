"""Exports: full weights in safetensors, for other programs, without optimizer states.

EXPORT/
    config.json                       RunRecord (configuration, tokenizer, parameter shapes), step
    model.safetensors                 or model-00001-of-00003.safetensors ... and
    model.safetensors.index.json      file of each parameter
    tokenizer.json                    if the tokenizer needs a file
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reformer_dist.checkpoint.files import json_bytes
from reformer_dist.checkpoint.reader import CheckpointReader, check_shapes, resolve_checkpoint
from reformer_dist.checkpoint.record import RunRecord
from reformer_dist.config.stage_values import saved_in_force
from reformer_dist.errors import CheckpointError
from reformer_dist.fs.atomic import make_staging, publish, write_synced
from reformer_dist.fs.tensors import save_file

CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class WeightChoice:
    """Which weights of a run."""

    averaged: bool = False
    """Their average (optim.average)."""
    best: bool = False
    """Of the checkpoint with the best value of trainer.keep_best."""


class WeightSource(Protocol):
    """Weights to export, with their description: a checkpoint, or a converted foreign model."""

    @property
    def folder(self) -> Path:
        """Directory of extra_files."""

    @property
    def record(self) -> RunRecord: ...

    @property
    def step(self) -> int: ...

    @property
    def extra_files(self) -> list[str]: ...

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor: ...


def write_export(
    source: WeightSource, folder: Path, max_shard_bytes: int | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Writes weights in float32 or another dtype, in one file or in files of at most `max_shard_bytes`.

    A larger parameter gets a file to itself. Raises CheckpointError if the directory exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; name a directory that does not")
    partial = make_staging(folder)
    shapes = source.record.shapes
    sizes = {name: dtype.itemsize * math.prod(shape) for name, shape in shapes.items()}
    shards = _split_shards(sizes, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        shard_file = WEIGHTS_FILE.replace(".", f"-{number:05d}-of-{len(shards):05d}.")
        file = WEIGHTS_FILE if len(shards) == 1 else shard_file
        tensors = {
            name: source.read(name, "fp32", 0, math.prod(shapes[name])).view(shapes[name]).to(dtype)
            for name in names
        }
        save_file(tensors, partial / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_synced(partial / INDEX_FILE, json_bytes(index))
    for name in source.extra_files:
        shutil.copyfile(source.folder / name, partial / name)  # not its mode
    config = saved_in_force(source.record.config, source.step)
    record = {**source.record.to_export_json(), "config": config, "step": source.step}
    write_synced(partial / CONFIG_FILE, json_bytes(record))
    publish(partial, folder)


def _split_shards(sizes: dict[str, int], limit: int | None) -> list[list[str]]:
    """Names of the parameters of each file, in order."""
    shards: list[list[str]] = [[]]
    shard_size = 0
    for name, size in sizes.items():
        if limit is not None and shards[-1] and shard_size + size > limit:
            shards.append([])
            shard_size = 0
        shards[-1].append(name)
        shard_size += size
    return shards


class Export:
    """Reads an export, with the interface of CheckpointReader for weights. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            document: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
            self.record = RunRecord.from_json(document)
            self.step: int = document["step"]
            self._files = self._read_weight_map()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"is not an export of a model ({type(error).__name__}: {error})"
            fix = "a model of another implementation is converted by reformer-convert"
            raise CheckpointError(f"{folder}: {problem}; {fix}") from error

    def _read_weight_map(self) -> dict[str, Path]:
        index = self.folder / INDEX_FILE
        if not index.is_file():
            return dict.fromkeys(self.record.shapes, self.folder / WEIGHTS_FILE)
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        for name in files.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {name!r} is not the name of a file in its directory")
        return {name: self.folder / file for name, file in files.items()}

    def load_weights(self, model: torch.nn.Module, ignored: Collection[str] = ()) -> None:
        """Loads all exported parameters but `ignored` into a model.

        Raises CheckpointError if names or shapes differ.
        """
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        check_shapes(self.folder, self.record.shapes, shapes, ignored)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                values = self._read(name)
                if values.shape != parameter.shape:
                    raise CheckpointError(f"{self._files[name]}: {name} has the shape {list(values.shape)}")
                parameter.copy_(values)

    def _read(self, name: str) -> Tensor:
        if name not in self._files:
            raise CheckpointError(f"{self.folder / INDEX_FILE}: lists no file for {name}")
        try:
            with safe_open(self._files[name], framework="pt") as tensors:
                return tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[name]}: can't be read: {error}") from error


def open_weights(path: Path, choice: WeightChoice | None = None) -> CheckpointReader | Export:
    """Opens a run directory (its newest intact checkpoint), a checkpoint, or an export. Raises CheckpointError."""
    choice = choice or WeightChoice()
    if not (path / CONFIG_FILE).is_file():
        return CheckpointReader(resolve_checkpoint(path, best=choice.best), averaged=choice.averaged)
    if choice.averaged or choice.best:
        flag = "--average" if choice.averaged else "--best"
        raise CheckpointError(
            f"{flag}: {path} is an export, which holds one set of weights; name a run or checkpoint"
        )
    return Export(path)


def saved_model_config(path: str) -> dict[str, Any]:
    """model.* of the weights at a path, without the attention backend. Raises CheckpointError."""
    source = open_weights(Path(path))
    saved: dict[str, Any] = dict(saved_in_force(source.record.config, source.step)["model"])
    saved.pop("attention_backend", None)
    return saved
