"""Weights alone, whole and by name, in the layout that other programs read; no optimizer states, no pickles.

EXPORT/
    config.json                       configuration, tokenizer, shapes of the parameters, step
    model.safetensors                 or model-00001-of-00003.safetensors ... and
    model.safetensors.index.json      which file holds which parameter
    tokenizer.json                    if the tokenizer needs a file
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reformer_dist.checkpoint.files import json_bytes, sync, write_bytes
from reformer_dist.checkpoint.reader import check_shapes
from reformer_dist.errors import CheckpointError

CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
DESCRIBED = ("config", "tokenizer", "vocab_size", "labels", "shapes")
BYTES = 4  # of a float32


class WeightSource(Protocol):
    """Weights by name and what is said of them: a checkpoint, or a model that comes from elsewhere."""

    @property
    def folder(self) -> Path:
        """Where extra_files lie."""

    @property
    def run(self) -> dict[str, Any]:
        """Configuration, tokenizer, size of the vocabulary, shapes of the parameters."""

    @property
    def step(self) -> int: ...

    @property
    def extra_files(self) -> list[str]: ...

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor: ...


def write_export(reader: WeightSource, folder: Path, max_shard_bytes: int | None = None) -> None:
    """Writes the weights of a checkpoint in float32, in one file or in files of at most `max_shard_bytes`.

    A parameter that is larger has a file of its own. Raises CheckpointError where the folder exists.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; name a folder that does not")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shapes: dict[str, list[int]] = reader.run["shapes"]
    shards = _deal({name: BYTES * math.prod(shape) for name, shape in shapes.items()}, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        single = WEIGHTS_FILE.replace(".", f"-{number:05d}-of-{len(shards):05d}.")
        file = WEIGHTS_FILE if len(shards) == 1 else single
        tensors = {
            name: reader.read(name, "fp32", 0, math.prod(shapes[name])).view(shapes[name]) for name in names
        }
        save_file(tensors, partial / file, metadata={"format": "pt"})
        sync(partial / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(BYTES * math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_bytes(partial / INDEX_FILE, json_bytes(index))
    for name in reader.extra_files:
        shutil.copy(reader.folder / name, partial / name)
    described = {key: reader.run[key] for key in DESCRIBED if key in reader.run}
    write_bytes(partial / CONFIG_FILE, json_bytes({**described, "step": reader.step}))
    sync(partial)
    partial.rename(folder)


def _deal(sizes: dict[str, int], limit: int | None) -> list[list[str]]:
    """Names in files, in their order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class Export:
    """An export, read as a CheckpointReader is where weights alone are asked for. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.run: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
            self.step: int = self.run["step"]
            self._files = self._weight_map()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}: is no export of a model ({type(error).__name__}: {error})"
            ) from error

    def _weight_map(self) -> dict[str, Path]:
        index = self.folder / INDEX_FILE
        if not index.is_file():
            return dict.fromkeys(self.run["shapes"], self.folder / WEIGHTS_FILE)
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        for name in files.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {name!r} is no name of a file beside it")
        return {name: self.folder / file for name, file in files.items()}

    def load_weights(self, model: torch.nn.Module) -> None:
        """Fills a model's parameters. Raises CheckpointError if they are not those of the export."""
        here = {name: list(p.shape) for name, p in model.named_parameters()}
        check_shapes(str(self.folder), self.run["shapes"], here)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                values = self._read(name)
                if values.shape != parameter.shape:
                    raise CheckpointError(f"{self._files[name]}: {name} has the shape {list(values.shape)}")
                parameter.copy_(values)

    def _read(self, name: str) -> Tensor:
        if name not in self._files:
            raise CheckpointError(f"{self.folder / INDEX_FILE}: names no file that holds {name}")
        try:
            with safe_open(self._files[name], framework="pt") as tensors:
                return tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[name]}: can't be read: {error}") from error
