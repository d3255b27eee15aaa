"""Parameter groups: which update, learning rate and weight decay each parameter gets, and which are frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from reformer_dist.checkpoint.fragment import MOMENTS
from reformer_dist.config import OptimConfig, OptimizerKind, ParameterGroup
from reformer_dist.config.keywords import nearest
from reformer_dist.errors import ConfigError


class Update(Enum):
    """The rule that updates the parameters of a group."""

    adamw = "adamw"
    muon = "muon"
    adafactor = "adafactor"
    """Of matrices: second moments in factors."""
    adafactor_vector = "adafactor of vectors"

    @property
    def moments(self) -> tuple[str, ...]:
        """State with an element for each one of a parameter, by its names in PyTorch."""
        return {
            Update.adamw: MOMENTS,
            Update.muon: ("momentum_buffer",),
            Update.adafactor: (),
            Update.adafactor_vector: ("variance",),
        }[self]


@dataclass(frozen=True)
class Group:
    """Parameters by name that share their settings."""

    update: Update
    lr_scale: float
    """Learning rate as a multiple of the schedule's."""
    weight_decay: float
    parameters: dict[str, nn.Parameter]

    def to_torch(self) -> dict[str, Any]:
        """As a parameter group of a torch optimizer."""
        return {
            "params": list(self.parameters.values()),
            "weight_decay": self.weight_decay,
            "lr_scale": self.lr_scale,
            "update": self.update,
        }


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Groups of all parameters that require gradients and are not frozen; none is empty.

    By default only matrices of linear layers decay. Raises ConfigError for a pattern that applies to no parameter.
    """
    entries = match_parameters(model, config)
    undecayed = _parameters_of(
        model,
        lambda name, module: (
            isinstance(module, nn.Embedding) or any(_is(name, part) for part in ("positions", "q_conv", "k_conv"))
        ),
    )
    outer = undecayed | _parameters_of(model, lambda name, _: _is(name, "head") or _is(name, "embedding"))
    groups: dict[tuple[Any, ...], Group] = {}
    for name, parameter in model.named_parameters():
        entry = entries[name]
        if not parameter.requires_grad or (entry is not None and entry.frozen):
            continue
        decays = parameter.dim() >= 2 and id(parameter) not in undecayed
        update = _choose_update(config.kind, parameter, is_inner=id(parameter) not in outer)
        decay = config.weight_decay if decays else 0.0
        lr_scale = 1.0
        if entry is not None:
            decay = decay if entry.weight_decay is None else entry.weight_decay
            lr_scale = lr_scale if entry.lr is None else entry.lr / config.lr
        position = -1 if entry is None else config.groups.index(entry)
        key = (position, list(Update).index(update), not decays)
        groups.setdefault(key, Group(update, lr_scale, decay, {})).parameters[name] = parameter
    return [groups[key] for key in sorted(groups)]


def _is(module_name: str, part: str) -> bool:
    return part in module_name.split(".")


def _parameters_of(model: nn.Module, selects: Callable[[str, nn.Module], bool]) -> set[int]:
    """Ids of the parameters of the selected modules."""
    return {id(p) for name, module in model.named_modules() if selects(name, module) for p in module.parameters()}


def _choose_update(kind: OptimizerKind, parameter: nn.Parameter, *, is_inner: bool) -> Update:
    """is_inner: whether the parameter belongs to a layer, not to an embedding or a head."""
    is_matrix = parameter.dim() >= 2
    if kind is OptimizerKind.adafactor:
        return Update.adafactor if is_matrix else Update.adafactor_vector
    return Update.muon if kind is OptimizerKind.muon and is_matrix and is_inner else Update.adamw


def match_parameters(model: nn.Module, config: OptimConfig) -> dict[str, ParameterGroup | None]:
    """The entry of optim.groups that applies to each parameter: the first that matches its name.

    Raises ConfigError for an entry that applies to none, and if all parameters are frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    found = {name: next((each for each in config.groups if fnmatchcase(name, each.match)), None) for name in names}
    for index, entry in enumerate(config.groups):
        if any(each is entry for each in found.values()):
            continue
        key = f"optim.groups[{index}].match={entry.match}"
        if any(fnmatchcase(name, entry.match) for name in names):
            raise ConfigError(f"{key}: every parameter that it matches is in a group before it; list it first")
        known = {*names, *(f"{name.partition('.')[0]}.*" for name in names)}
        similar = nearest(entry.match, known) or f"{names[0].partition('.')[0]}.*"
        raise ConfigError(f"{key}: matches no parameter of the model; did you mean {similar}?")
    if all(entry is not None and entry.frozen for entry in found.values()):
        raise ConfigError("optim.groups: freeze every parameter; leave some to train")
    return found


def freeze(model: nn.Module, config: OptimConfig) -> None:
    """Freezes the parameters that optim.groups freeze. Raises ConfigError, as match_parameters does."""
    entries = match_parameters(model, config)
    for name, parameter in model.named_parameters():
        entry = entries[name]
        if entry is not None and entry.frozen:
            parameter.requires_grad_(False)
