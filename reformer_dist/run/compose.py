"""Composes a RunConfig from yaml files and the command line with Hydra; the dataclasses validate it.

No yaml names Python code: there is no `_target_`, the schema refuses unknown keys, and `command_line` refuses
settings of Hydra.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from reformer_dist.config import RunConfig
from reformer_dist.config.checks import ConfigGroup, one_of
from reformer_dist.config.key_reference import nearest_keys
from reformer_dist.config.keywords import nearest
from reformer_dist.config.renamed import RENAMED, refuse_renamed, refuse_renamed_overrides, translate_saved
from reformer_dist.errors import CheckpointError, ConfigError
from reformer_dist.run.command_line import (
    CONFIG_NAME,
    FILE_ERRORS,
    OWN_FILES,
    ConfigFiles,
    as_hydra_reads,
    compose_safely,
    conf_folder,
    describe_file_error,
    hydra_context,
    parse_command_line,
)
from reformer_dist.run.whole_numbers import whole_number, with_whole_numbers

# a key of this name would be a callable for Hydra or for logging
CALLABLE_KEYS = ("_target_", "()")

WHOLE = "must be a whole number"
# error messages of the libraries, with the value in the first group, and the requirement that replaces them
VALUE_ERRORS = (
    (re.compile(r"Value '(.*)' of type '.*' could not be converted to Integer"), WHOLE),
    (re.compile(r"Value '(.*)' of type '.*' could not be converted to Float"), "must be a number"),
    (re.compile(r"Value '(.*)' is not a valid bool"), "must be true or false"),
    (re.compile(r"Invalid value '(.*)', expected one of \[(.*)\]"), "must be one of {1}"),
)
UNKNOWN_KEY = re.compile(r"Key '.*' not in '.*'")
NO_SUCH_KEY = "there is no such key"
SEVERAL_VALUES = re.compile(r"Ambiguous value for argument '(.*)'|Sweep parameters '(.*)' requires --multirun")
NOT_A_LIST = re.compile(r"is not a ListConfig, list or tuple")
UNKNOWN_CHOICE = re.compile(r"Could not find '(.*)/(.*)'\s+Available options in '.*':\n((?:\t.*\n?)*)")


def hydra_entry(task: Callable[[RunConfig], None]) -> None:
    """Runs `task` with the configuration of the command line. Raises ConfigError."""
    line = parse_command_line(sys.argv[1:])
    if not line.shows:
        task(compose_run(line.overrides, line.files))
        return
    with hydra_context(line.files) as loader:
        if not line.completes:  # of an unfinished line, for which Hydra only reads the files
            compose_config(line.overrides, line.files, loader)
            flags = [word for word in sys.argv if word not in line.overrides]
            sys.argv = [*flags, *as_hydra_reads(line.overrides, loader)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors in its own format and exits
    show = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=CONFIG_NAME)
    try:
        show(lambda config: None)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def compose_run(overrides: list[str], files: ConfigFiles | None = None) -> RunConfig:
    """The configuration that a command line of these overrides would run. Raises ConfigError."""
    files = files or ConfigFiles()
    with hydra_context(files) as loader:
        return to_run_config(_with_initial_model(compose_config(overrides, files, loader), overrides))


def compose_config(overrides: list[str], files: ConfigFiles, loader: ConfigLoaderImpl) -> DictConfig:
    """Composes overrides of one value each in a hydra_context of `files`. Raises ConfigError."""
    try:
        return compose_safely(as_hydra_reads(overrides, loader), files)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, overrides)) from error
    except FILE_ERRORS as error:
        where = " ".join([*files.arguments(), *overrides])
        raise ConfigError(f"{where}: {describe_file_error(error)}") from error


def _with_initial_model(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """With init_from, takes model.* from the initial weights, except for keys that `overrides` set."""
    if composed.init_from is None:
        return composed
    # imports torch, which commands without init_from need not wait for
    from reformer_dist.checkpoint.export import saved_model_config

    try:
        saved = {"model": saved_model_config(composed.init_from)}
    except CheckpointError:
        own = None
        with suppress(CheckpointError):  # a run with checkpoints of its own no longer needs the source
            own = saved_model_config(composed.output_dir)
        if own is None:
            raise
        saved = {"model": own}
    kept = [word.lstrip("+") for word in with_whole_numbers(overrides) if word.lstrip("+").startswith("model.")]
    try:
        merged = OmegaConf.merge(composed, saved, OmegaConf.from_dotlist(kept))
    except OmegaConfBaseException as error:
        raise ConfigError(f"init_from={composed.init_from}: {explain(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def to_run_config(composed: Any) -> RunConfig:
    """Converts to the dataclasses, which check their values. Raises ConfigError."""
    values = OmegaConf.to_container(composed, enum_to_str=True)
    refuse_callables(values, "")
    refuse_unknown(values, RunConfig(), "")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, RunConfig)
    return config


def refuse_unknown(values: Any, known: Any, prefix: str) -> None:
    """Raises ConfigError for keys that no dataclass has: Hydra's `+key=value` bypasses the schema."""
    if not is_dataclass(known):
        return
    names = {field.name for field in fields(known)}
    for key, value in values.items():
        refuse_renamed(f"{prefix}{key}", value)
        if key not in names:
            raise ConfigError(f"{prefix}{key}={value}: {NO_SUCH_KEY}{_suggest(f'{prefix}{key}', type(known))}")
        refuse_unknown(value, getattr(known, key), f"{prefix}{key}.")


def refuse_callables(values: Any, prefix: str) -> None:
    """Raises ConfigError for keys that name a callable, at any depth."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key in CALLABLE_KEYS:
                raise ConfigError(f"{prefix}{key}={value}: there is no such key; a configuration names no code")
            refuse_callables(value, f"{prefix}{key}.")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            refuse_callables(value, f"{prefix}{index}.")


def run_config_from(saved: dict[str, Any], overrides: list[str]) -> RunConfig:
    """A saved configuration with `key=value` overrides, validated as at the start of a run. Raises ConfigError."""
    refuse_renamed_overrides(overrides)
    try:
        schema = OmegaConf.structured(RunConfig)
        changes = OmegaConf.from_dotlist(with_whole_numbers(overrides))
        merged = OmegaConf.merge(schema, translate_saved(saved), changes)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, overrides)) from error
    except (YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise ConfigError(f"{' '.join(overrides)[:400]}: a value is not valid YAML: {error}") from error
    return to_run_config(merged)


def to_dict(config: Any) -> Any:
    """A configuration or group as a dict of JSON values, with enums by name."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, list):
        return [to_dict(item) for item in config]
    return config


def to_yaml(config: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """The innermost useful message, with the nearest known keys if the key is unknown.

    overrides: those of the command line, whose value of an unknown key is shown.
    """
    cause: BaseException | None = error
    innermost: OmegaConfBaseException | None = None
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            innermost = cause
        # Hydra raises the errors of files without "from"
        cause = cause.__cause__ or (cause.__context__ if isinstance(cause, HydraException) else None)
    if innermost is None:
        return _explain_hydra(str(error))
    first_line = (innermost.msg or str(innermost)).splitlines()[0]
    key = str(innermost.full_key or innermost.key or "")
    if key in RENAMED:  # in a yaml file; the value is unknown here
        return f"{key}: {RENAMED[key]}"
    if NOT_A_LIST.search(first_line):
        return f"{key}: must be a list, such as {key}={_example(key)}"
    for pattern, requirement in VALUE_ERRORS:
        if match := pattern.match(first_line):
            whole = whole_number(match[1]) if requirement == WHOLE else match[1]
            hint = f"; write {whole}" if whole != match[1] else ""
            return f"{key}={match[1]}: {requirement.format(*match.groups())}{hint}"
    if UNKNOWN_KEY.match(first_line):
        shown = next((word for word in overrides if word.partition("=")[0].lstrip("+~") == key), key)
        return f"{shown}: {NO_SUCH_KEY}{_suggest(key, innermost.object_type)}"
    message = first_line if not key or key in first_line else f"{key}: {first_line}"
    return message + _suggest(key, innermost.object_type)


def _explain_hydra(message: str) -> str:
    """Hydra's message in one line; for an unknown choice of a group, the known ones instead of the search path."""
    if match := SEVERAL_VALUES.search(message):
        fix = "add --multirun to try each in a sweep, or write a list as key=[a,b]"
        return f"{match[1] or match[2]}: has several values; {fix}"
    match = UNKNOWN_CHOICE.search(message)
    if match is None:
        return message.strip().splitlines()[0]
    # the choice may itself be a path
    group, choice = f"{match[1]}/{match[2]}".split("/", 1)
    known = match[3].split()
    if group == "deepspeed" and choice.endswith(".json"):
        fix = "DeepSpeed's own file is not read; its settings are deepspeed.*, optim.* and trainer.*"
        return f"{group}={choice}: must be {one_of(known)}; {fix}"
    closest = nearest(choice, known)
    hint = f"; did you mean {closest}?" if closest else f"; {OWN_FILES}" if group == "experiment" else ""
    return f"{group}={choice}: must be {one_of(known)}{hint}"


def _example(key: str) -> str:
    """An example of a list: the default value, if it has one."""
    value: Any = RunConfig()
    for name in key.split("."):
        value = getattr(value, name, None)
    return f"[{','.join(map(str, to_dict(value)))}]" if isinstance(value, list) and value else "[a,b]"


def _suggest(key: str, group: Any) -> str:
    """The keys that an unknown one may stand for, or all of its dataclass."""
    known = [field.name for field in fields(group)] if isinstance(group, type) and is_dataclass(group) else []
    name = key.rsplit(".", 1)[-1]
    if not known or name in known:
        return ""
    if issubclass(group, ConfigGroup) and name in group.counterparts:
        return f"; use {group.counterparts[name]}"
    closest = nearest_keys(key)
    return f"; did you mean {one_of(closest)}?" if closest else f"; known keys: {', '.join(known)}"
