"""Sweep requests: parses `--multirun` with Hydra's grammar into fixed overrides and a search space."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reformer_dist.config import LauncherConfig, RunConfig, SweepConfig
from reformer_dist.errors import ConfigError
from reformer_dist.run.command_line import ConfigFiles, hydra_context, parse_command_line, parse_overrides
from reformer_dist.run.compose import compose_config, explain, hydra_entry, refuse_unknown
from reformer_dist.sweep.space import Choices, Dimension, Interval, SearchSpace

SWEEP = "sweep"
# keys that a sweep sets for each trial
RESERVED_KEYS = ("output_dir", "resume")


@dataclass(frozen=True)
class SweepRequest:
    """A sweep as requested on the command line."""

    settings: SweepConfig
    launcher: LauncherConfig
    folder: Path
    """output_dir; each trial has a subfolder."""
    fixed: list[str]
    """Overrides of every trial."""
    space: SearchSpace
    files: ConfigFiles = field(default_factory=ConfigFiles)
    """The user's own yaml files, which every trial reads too."""


def run_or_sweep(task: Callable[[RunConfig], None], sweep: Callable[[SweepRequest], None]) -> None:
    """Runs `task` with the configuration of the command line, or `sweep` if it requests a sweep.

    Raises ConfigError for an invalid command line.
    """
    if is_sweep(sys.argv[1:]):
        line = parse_command_line(sys.argv[1:])
        sweep(parse_request(line.overrides, line.files))
    else:
        hydra_entry(task)


def parse_request(overrides: list[str], files: ConfigFiles | None = None) -> SweepRequest:
    """Parses overrides. Fixed keys are only partly checked: trials may still be invalid. Raises ConfigError."""
    files = files or ConfigFiles()
    with hydra_context(files) as loader:
        fixed, sweep_settings, space = _classify_overrides(overrides, loader)
        composed = compose_config([*fixed, *sweep_settings], files, loader)
        refuse_unknown(OmegaConf.to_container(composed.sweep), SweepConfig(), "sweep.")
        try:
            settings, launcher = OmegaConf.to_object(composed.sweep), OmegaConf.to_object(composed.launcher)
            folder = Path(composed.output_dir)
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error)) from error
        assert isinstance(settings, SweepConfig) and isinstance(launcher, LauncherConfig)
        fixed_keys = {word.partition("=")[0] for word in fixed}
        params: SearchSpace = {}
        for key, value in settings.params.items():
            if key not in fixed_keys:
                (override,) = parse_overrides([f"{key}={value}"], loader)
                is_range = override.is_sweep_override()
                word = f"sweep.params: {key}={value}"
                params[key] = _parse_dimension(override, word) if is_range else Choices((value,))
    return SweepRequest(settings, launcher, folder, fixed, params | space, files)


def is_sweep(arguments: list[str]) -> bool:
    """Whether a command line has --multirun or sweep=... and no informational flag such as --cfg or --help.

    Raises ConfigError for sweep settings without a sweep.
    """
    line = parse_command_line(arguments)
    if line.shows:
        return False
    keys = [word.partition("=")[0].lstrip("+") for word in line.overrides]
    if line.multirun or SWEEP in keys:
        return True
    for key, word in zip(keys, line.overrides, strict=True):
        if key.startswith(f"{SWEEP}."):
            raise ConfigError(f"{word}: only valid in a sweep; add --multirun, or sweep=grid, optuna or lsh")
    return False


def _classify_overrides(words: list[str], loader: ConfigLoaderImpl) -> tuple[list[str], list[str], SearchSpace]:
    """Returns (overrides with one value, sweep=... and sweep.key=..., overrides with several values).

    loader: resolves the options of `group=glob(*)`. Raises ConfigError.
    """
    fixed: list[str] = []
    settings: list[str] = []
    space: SearchSpace = {}
    for word, override in zip(words, parse_overrides(words, loader), strict=True):
        key = override.get_key_element()
        name = override.key_or_group
        if name == SWEEP or name.startswith(f"{SWEEP}."):
            if override.is_sweep_override():
                raise ConfigError(f"{word}: settings of the sweep take one value each")
            settings.append(word)
        elif not override.is_sweep_override():
            space.pop(key, None)  # the last override of a key wins
            fixed.append(word)
        elif name in RESERVED_KEYS:
            raise ConfigError(f"{word}: each trial has its own folder in output_dir; give one value")
        else:
            space[key] = _parse_dimension(override, word)
            fixed = drop_key(fixed, name)
    return fixed, settings, space


def _parse_dimension(override: Override, word: str) -> Dimension:
    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        is_integer = isinstance(value.start, int) and isinstance(value.end, int)
        low, high, is_log = float(value.start), float(value.end), "log" in value.tags
        if not low < high or (is_log and low <= 0):
            condition = " and start above 0 if logarithmic" if is_log else ""
            raise ConfigError(f"{word}: an interval must be increasing{condition}")
        return Interval(low, high, is_integer=is_integer, is_log=is_log)
    if getattr(value, "shuffle", False):
        raise ConfigError(f"{word}: the order would differ at each start; leave shuffle out")
    if isinstance(value, RangeSweep):
        numbers = list(value.range())
        if not numbers:
            raise ConfigError(f"{word}: the range is empty; give at least one value")
        is_integer = all(isinstance(number, int) for number in numbers)
        low, high, step = float(min(numbers)), float(max(numbers)), abs(float(value.step))
        return Interval(low, high, step, is_integer, "log" in value.tags)
    values = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not values:
        raise ConfigError(f"{word}: has no values; give at least one")
    return Choices(values)


def as_override(key: str, value: str) -> str:
    """key=value for any string, quoted if Hydra's grammar would parse it differently."""
    word = f"{key}={value}"
    try:
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override() and override.value() == value:
            return word
    except HydraException:
        pass  # quoted below
    quoted = value.replace("\\", "\\\\").replace("'", "\\'") if value.endswith("\\") else value.replace("'", "\\'")
    return f"{key}='{quoted}'"


def drop_key(words: Iterable[str], key: str) -> list[str]:
    """The overrides that do not set `key`."""
    return [word for word in words if word.partition("=")[0].lstrip("+~") != key]
