"""What `--multirun` asks for, parsed by Hydra's own grammar: fixed overrides, and keys with several values."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reformer_dist.config import LauncherConfig, RunConfig, SweepConfig
from reformer_dist.errors import ConfigError
from reformer_dist.run.compose import (
    command_line_overrides,
    compose_config,
    explain,
    hydra_context,
    hydra_entry,
    refuse_unknown,
    register_schema,
)
from reformer_dist.sweep.space import Choices, Dimension, Interval, SearchSpace

SWEEP = "sweep"
# keys whose values a sweep sets itself
OWN_KEYS = ("output_dir", "resume")


@dataclass(frozen=True)
class Overrides:
    """Of one command line, as typed."""

    fixed: list[str]
    """Those of one value, for every trial alike."""
    settings: list[str]
    """sweep=... and sweep.key=..., which trials do not see."""
    space: SearchSpace
    """Those of several values."""


@dataclass(frozen=True)
class SweepRequest:
    """What `--multirun` asks for."""

    settings: SweepConfig
    launcher: LauncherConfig
    folder: Path
    """output_dir, in which each trial has a folder of its own."""
    fixed: list[str]
    """Overrides that every trial gets."""
    space: SearchSpace


def run_or_sweep(task: Callable[[RunConfig], None], sweep: Callable[[SweepRequest], None]) -> None:
    """Runs `task` with the configuration that the command line describes, or `sweep` if it asks for a sweep.

    Raises ConfigError for a command line that describes neither.
    """
    if is_sweep(sys.argv[1:]):
        sweep(parse_request(command_line_overrides(sys.argv[1:])))
    else:
        hydra_entry(task)


def parse_request(words: list[str]) -> SweepRequest:
    """Keys of one value are read as far as a sweep needs them; together with others, they may yet be wrong."""
    register_schema()
    with hydra_context() as loader:
        given = read_overrides(words, loader)
        composed = compose_config([*given.fixed, *given.settings])
        refuse_unknown(OmegaConf.to_container(composed.sweep), SweepConfig(), "sweep.")
        try:
            settings, launcher = OmegaConf.to_object(composed.sweep), OmegaConf.to_object(composed.launcher)
            folder = Path(composed.output_dir)
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error)) from error
        assert isinstance(settings, SweepConfig) and isinstance(launcher, LauncherConfig)
        named = {word.partition("=")[0] for word in given.fixed}
        params = {key: value for key, value in settings.params.items() if key not in named}
        space = read_params(params, loader) | given.space
    return SweepRequest(settings, launcher, folder, given.fixed, space)


def is_sweep(arguments: list[str]) -> bool:
    """Whether a command line says --multirun or sweep=..., and is not only to show something (--cfg, --help).

    Raises ConfigError where it has settings of a sweep for one run.
    """
    given, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    if unknown or given.help or given.hydra_help or given.cfg or given.info or given.shell_completion:
        return False
    keys = [word.partition("=")[0].lstrip("+") for word in given.overrides]
    if given.multirun or SWEEP in keys:
        return True
    for key, word in zip(keys, given.overrides, strict=True):
        if key.startswith(f"{SWEEP}."):
            raise ConfigError(f"{word}: is for a sweep; add --multirun, or sweep=grid, optuna or lsh")
    return False


def read_overrides(words: list[str], loader: ConfigLoader | None = None) -> Overrides:
    """Sorts overrides. loader: finds the choices of `group=glob(*)`. Raises ConfigError."""
    fixed: list[str] = []
    settings: list[str] = []
    space: SearchSpace = {}
    for word, override in zip(words, _parse(words, loader), strict=True):
        key = override.get_key_element()
        bare = override.key_or_group
        if override.is_hydra_override():
            raise ConfigError(f"{word}: a sweep does without Hydra's own settings; see sweep=... and launcher=...")
        if bare == SWEEP or bare.startswith(f"{SWEEP}."):
            if override.is_sweep_override():
                raise ConfigError(f"{word}: a sweep has one value of each of its settings")
            settings.append(word)
        elif not override.is_sweep_override():
            space.pop(key, None)  # of a key that is given twice, the last counts
            fixed.append(word)
        elif bare in OWN_KEYS:
            raise ConfigError(f"{word}: a sweep makes a folder in output_dir for each trial; give one value")
        else:
            space[key] = _dimension(override, word)
            fixed = without(fixed, bare)
    return Overrides(fixed, settings, space)


def read_params(params: dict[str, str], loader: ConfigLoader | None = None) -> SearchSpace:
    """The space that sweep.params spells, each value as in an override. Raises ConfigError."""
    space: SearchSpace = {}
    for key, value in params.items():
        (override,) = _parse([f"{key}={value}"], loader)
        if override.is_sweep_override():
            space[key] = _dimension(override, f"sweep.params: {key}={value}")
        else:
            space[key] = Choices((value,))
    return space


def _parse(words: list[str], loader: ConfigLoader | None) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create(config_loader=loader).parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"{shlex.join(words)}: {str(error).splitlines()[0]}") from error
    return parsed


def _dimension(override: Override, word: str) -> Dimension:
    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        low, high, is_log = float(value.start), float(value.end), "log" in value.tags
        if not low < high or (is_log and low <= 0):
            raise ConfigError(f"{word}: an interval goes up{', from above 0 if logarithmic' if is_log else ''}")
        return Interval(low, high, is_integer=whole, is_log=is_log)
    if getattr(value, "shuffle", False):
        raise ConfigError(f"{word}: a shuffled order would be another one in each start; leave shuffle out")
    if isinstance(value, RangeSweep):
        return _range(value, word)
    values = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not values:
        raise ConfigError(f"{word}: names no value")
    return Choices(values)


def _range(value: RangeSweep, word: str) -> Interval:
    values = list(value.range())
    if not values:
        raise ConfigError(f"{word}: the range is empty")
    low, high = min(values), max(values)
    whole = all(isinstance(each, int) for each in values)
    return Interval(float(low), float(high), abs(float(value.step)), whole, "log" in value.tags)


def as_override(key: str, value: str) -> str:
    """key=value for any text, quoted where Hydra's grammar would read it as something else."""
    word = f"{key}={value}"
    try:
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override() and override.value() == value:
            return word
    except HydraException:
        pass
    quoted = value.replace("\\", "\\\\").replace("'", "\\'") if value.endswith("\\") else value.replace("'", "\\'")
    return f"{key}='{quoted}'"


def without(words: Iterable[str], key: str) -> list[str]:
    """The overrides that do not set `key`."""
    return [word for word in words if word.partition("=")[0].lstrip("+~") != key]
