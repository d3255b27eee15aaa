"""Readers of foreign checkpoints: options from JSON, and tensors from safetensors or a file of torch.save.

The latter is a pickle. PyTorch's restricted loader reads it, which builds tensors and containers, and refuses the
rest.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reformer_dist.config import ModelConfig
from reformer_dist.config.keywords import with_nearest
from reformer_dist.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class HeadKind(Enum):
    """Kind of a model's head."""

    language_model = "language_model"
    sequence_classification = "sequence_classification"
    question_answering = "question_answering"


@dataclass
class ForeignModel:
    """A model of another implementation, converted to our config and parameter names."""

    system: str
    head: HeadKind
    config: ModelConfig
    vocab_size: int
    weights: dict[str, Tensor]
    """float32, by our parameter names."""
    notes: list[str] = field(default_factory=list)
    """Differences from the original model that users should know about."""
    classes: list[str] = field(default_factory=list)
    """Class names, if the head is sequence_classification."""
    has_mask_token: bool = False
    """Whether the last token of a masked language model is the mask token."""

    @property
    def is_masked(self) -> bool:
        """Whether this is a masked language model."""
        return self.head is HeadKind.language_model and not self.config.causal


class ForeignOptions:
    """Options of a foreign model. Those that are never taken, or have no counterpart, are refused by name."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self._values = path, values
        self._untaken, self._known = set(values), set[str]()

    @staticmethod
    def read(path: Path) -> ForeignOptions:
        """Reads a JSON file. Raises CheckpointError."""
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: is missing") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: can't be read: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: must be a JSON object")
        return ForeignOptions(path, values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, default: Any = None, *, kind: type | tuple[type, ...] | None = None) -> Any:
        """The value of an option, `default` if it is absent. Raises CheckpointError if its type is wrong."""
        self._untaken.discard(name)
        self._known.add(name)
        value = self._values.get(name, default)
        kinds = kind if isinstance(kind, tuple) else () if kind is None else (kind,)
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            self.refuse(name, f"must be {' or '.join(k.__name__ for k in kinds)}")
        return value

    def require(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """The value of a required option. Raises CheckpointError if it is absent or its type is wrong."""
        if name not in self._values:
            raise CheckpointError(f"{self.path}: {name} is missing; the model needs it")
        return self.take(name, kind=kind)

    def take_choice(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        """Maps the value of an option through `choices`. Raises CheckpointError for other values."""
        value = self.take(name, default)
        if value not in choices:
            self.refuse(name, f"must be {' or '.join(choices)}")
        return choices[value]

    def take_factors(self, name: str) -> list[int] | None:
        """Even factors of a number of buckets; None if the option is absent. Raises CheckpointError."""
        value = self.take(name, None)
        factors = [value] if isinstance(value, int) else list(value or ())
        if not all(isinstance(factor, int) and factor > 0 and factor % 2 == 0 for factor in factors):
            self.refuse(name, "must be an even number or a list of even numbers")
        return None if value is None else factors

    def refuse_other_values(self, supported: Mapping[str, tuple[Any, str]]) -> None:
        """Refuses options that differ from their only supported value; supported: (value, reason) by name."""
        for name, (value, reason) in supported.items():
            if self.take(name, value) != value:
                self.refuse(name, reason)

    def refuse(self, name: str, reason: str) -> None:
        """Raises CheckpointError for an option."""
        raise CheckpointError(f"{self.path}: {name}={json.dumps(self._values.get(name))}: {reason}")

    def refuse_unknown(self, system: str) -> None:
        """Refuses options that were never taken, each with the nearest one that was."""
        if self._untaken:
            unknown = with_nearest(sorted(self._untaken), self._known)
            raise CheckpointError(f"{self.path}: {system} has no such option: {unknown}")


class ForeignTensors:
    """Tensors of a directory's safetensors files, or of its only pickle, by name. Raises CheckpointError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._unpickled: dict[str, Tensor] = {}
        self._files = self._find_files()

    def _find_files(self) -> dict[str, Path]:
        """Maps names of tensors to files."""
        directory = self.directory
        if (directory / INDEX_FILE).is_file():
            try:
                weight_map: dict[str, str] = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
                is_inside = all(Path(file).name == file for file in weight_map.values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{directory / INDEX_FILE}: can't be read: {error!r}") from error
            if not is_inside:
                raise CheckpointError(f"{directory / INDEX_FILE}: names files outside its directory")
            return {name: directory / file for name, file in weight_map.items()}
        path = directory / WEIGHTS_FILE
        if path.is_file():
            try:
                with safe_open(path, framework="pt") as tensors:
                    return dict.fromkeys(tensors.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: can't be read: {error}") from error
        pickles = sorted(path for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if not pickles:
            raise CheckpointError(f"{directory}: has no {WEIGHTS_FILE}")
        if len(pickles) > 1:
            names = ", ".join(path.name for path in pickles)
            raise CheckpointError(f"{directory}: has no {WEIGHTS_FILE}, and one of {names} must be left")
        self._unpickled = _read_pickled(pickles[0])
        return dict.fromkeys(self._unpickled, pickles[0])

    def names(self) -> set[str]:
        return set(self._files)

    def get(self, name: str) -> Tensor:
        """One tensor as float32."""
        if name not in self._files:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing, which its {CONFIG_FILE} requires")
        if name in self._unpickled:
            return self._unpickled[name].float()
        try:
            with safe_open(self._files[name], framework="pt") as tensors:
                return tensors.get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[name]}: can't be read: {error}") from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a state dict that torch.save wrote. Nothing in the file is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: can't be read as tensors alone ({reason}); save it with torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{path}: is no state dict; save one with torch.save(model.state_dict(), FILE)")
    return {str(name): x for name, x in state.items()}


def parameter_shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a model that is built on the meta device."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build().named_parameters()}


def reshape_checked(tensor: Tensor, shape: tuple[int, ...], name: str, where: Path) -> Tensor:
    """Reshapes a tensor if only dimensions of size 1 differ, else raises CheckpointError for `name`."""
    if [side for side in tensor.shape if side != 1] != [side for side in shape if side != 1]:
        expected = f"its options require {list(shape)}"
        raise CheckpointError(f"{where}: {name} has shape {list(tensor.shape)}; {expected}")
    return tensor.reshape(shape).contiguous()
