"""What is read of another system: its options, each asked for by name, and its tensors. No pickle is opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reformer_dist.config import ModelConfig
from reformer_dist.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class HeadKind(Enum):
    """What a model predicts."""

    language_model = "language_model"
    sequence_classification = "sequence_classification"
    question_answering = "question_answering"


@dataclass
class ForeignModel:
    """A model of another system in our terms."""

    system: str
    head: HeadKind
    config: ModelConfig
    vocab_size: int
    weights: dict[str, Tensor]
    """By our names, float32."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of what is not, or not quite, as it was."""
    classes: list[str] = field(default_factory=list)
    """Of a sequence_classification."""
    has_mask_token: bool = False
    """Of a two-sided language model: its last token stands for hidden ones."""

    @property
    def is_masked(self) -> bool:
        """Whether it tells hidden tokens instead of the next one."""
        return self.head is HeadKind.language_model and not self.config.causal


class ForeignOptions:
    """The options of a foreign model. Each is taken by name; one that nobody takes, or that has no counterpart,
    is refused by name with the reason."""

    def __init__(self, path: Path, given: Mapping[str, Any]) -> None:
        self.path, self._given, self._open = path, given, set(given)

    @staticmethod
    def read(path: Path) -> ForeignOptions:
        """Of a JSON file. Raises CheckpointError."""
        try:
            given = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: is missing") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: can't be read: {error}") from error
        if not isinstance(given, dict):
            raise CheckpointError(f"{path}: must be a JSON object")
        return ForeignOptions(path, given)

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def take(self, name: str, default: Any = None, *, kind: type | tuple[type, ...] | None = None) -> Any:
        """The value of an option, `default` where it is absent. Raises CheckpointError where its type is wrong."""
        self._open.discard(name)
        value = self._given.get(name, default)
        kinds = kind if isinstance(kind, tuple) else () if kind is None else (kind,)
        is_wrong = bool(kinds) and (
            not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        )
        if is_wrong:
            self.refuse(name, f"must be {' or '.join(k.__name__ for k in kinds)}")
        return value

    def need(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """The value of an option that must be given."""
        if name not in self._given:
            raise CheckpointError(f"{self.path}: has no {name}, which the model needs")
        return self.take(name, kind=kind)

    def one_of(self, name: str, known: Mapping[str, Any], default: str) -> Any:
        """What the value of an option stands for."""
        value = self.take(name, default)
        if value not in known:
            self.refuse(name, f"must be {' or '.join(known)}")
        return known[value]

    def only(self, reasons: Mapping[str, tuple[Any, str]]) -> None:
        """Refuses options that are given with another value than the one beside them: it has no counterpart."""
        for name, (neutral, reason) in reasons.items():
            if self.take(name, neutral) != neutral:
                self.refuse(name, reason)

    def refuse(self, name: str, reason: str) -> None:
        raise CheckpointError(f"{self.path}: {name}={json.dumps(self._given.get(name))}: {reason}")

    def close(self, system: str) -> None:
        """Refuses options that nobody has asked for."""
        if self._open:
            unknown = ", ".join(sorted(self._open))
            raise CheckpointError(f"{self.path}: {system} has no such option: {unknown}")


class ForeignTensors:
    """The tensors of a folder's safetensors files, by name. Raises CheckpointError, also for pickles."""

    def __init__(self, folder: Path, pickle_hint: str) -> None:
        """pickle_hint: how a pickle becomes safetensors, for whoever has only that."""
        self.folder = folder
        self._files = self._find(pickle_hint)

    def _find(self, pickle_hint: str) -> dict[str, Path]:
        folder = self.folder
        if (folder / INDEX_FILE).is_file():
            try:
                named: dict[str, str] = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
                plain = all(Path(file).name == file for file in named.values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{folder / INDEX_FILE}: can't be read: {error!r}") from error
            if not plain:
                raise CheckpointError(f"{folder / INDEX_FILE}: names files outside its folder")
            return {name: folder / file for name, file in named.items()}
        path = folder / WEIGHTS_FILE
        if path.is_file():
            try:
                with safe_open(path, framework="pt") as tensors:
                    return dict.fromkeys(tensors.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: can't be read: {error}") from error
        pickles = sorted(each.name for each in folder.iterdir() if each.suffix in PICKLES)
        if pickles:
            raise CheckpointError(f"{folder / pickles[0]}: is a pickle, which can run any code; {pickle_hint}")
        raise CheckpointError(f"{folder}: has no {WEIGHTS_FILE}")

    def names(self) -> set[str]:
        return set(self._files)

    def get(self, name: str) -> Tensor:
        """One tensor as float32."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: holds no tensor {name}, which its {CONFIG_FILE} calls for")
        try:
            with safe_open(self._files[name], framework="pt") as tensors:
                return tensors.get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[name]}: can't be read: {error}") from error


def parameter_shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model that is built without memory."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build().named_parameters()}


def reshape_checked(tensor: Tensor, shape: tuple[int, ...], theirs: str, where: Path) -> Tensor:
    """The tensor in a shape that differs from its own by sides of 1 only. Raises CheckpointError."""
    if [side for side in tensor.shape if side != 1] != [side for side in shape if side != 1]:
        raise CheckpointError(
            f"{where}: {theirs} has the shape {list(tensor.shape)}; its options call for {list(shape)}"
        )
    return tensor.reshape(shape).contiguous()
