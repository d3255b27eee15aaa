"""From conf/ and the command line to a RunConfig: Hydra composes, the dataclasses judge.

No yaml names Python code: there is no `_target_`, and the schema refuses keys that it does not know.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from reformer_dist.config import RunConfig
from reformer_dist.config.checks import one_of
from reformer_dist.config.renamed import RENAMED, refuse_renamed, refuse_renamed_overrides, translate_saved
from reformer_dist.errors import ConfigError

CONFIG_NAME = "train"

# what the libraries say of a value, with the value in the first group, and what would be right
WRONG_VALUES = (
    (re.compile(r"Value '(.*)' of type '.*' could not be converted to Integer"), "must be a whole number"),
    (re.compile(r"Value '(.*)' of type '.*' could not be converted to Float"), "must be a number"),
    (re.compile(r"Value '(.*)' is not a valid bool"), "must be true or false"),
    (re.compile(r"Invalid value '(.*)', expected one of \[(.*)\]"), "must be one of {1}"),
)
NO_LIST = re.compile(r"is not a ListConfig, list or tuple")
NO_CHOICE = re.compile(r"Could not find '(.*)/(.*)'\s+Available options in '.*':\n((?:\t.*\n?)*)")


def conf_folder() -> Path:
    """conf/ of the checkout that this package lies in, else the copy that the wheel installed."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "conf"


def register_schema() -> None:
    ConfigStore.instance().store(name="schema", node=RunConfig)


def hydra_entry(task: Callable[[RunConfig], None]) -> None:
    """Runs `task` with the configuration that the command line describes. Raises ConfigError."""
    register_schema()
    # without it, Hydra would print errors in its own way and exit
    os.environ["HYDRA_FULL_ERROR"] = "1"
    refuse_renamed_overrides(command_line_overrides(sys.argv[1:]))
    composed: list[DictConfig] = []
    compose = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=CONFIG_NAME)
    try:
        compose(composed.append)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    if composed:  # --help, --cfg and the like describe no run
        task(to_run_config(_with_start(composed[0], command_line_overrides(sys.argv[1:]))))


def compose_run(overrides: list[str]) -> RunConfig:
    """What a command line of these overrides would run. Raises ConfigError."""
    register_schema()
    with hydra_context():
        return to_run_config(_with_start(compose_config(overrides), overrides))


def command_line_overrides(arguments: list[str]) -> list[str]:
    """The overrides of a command line."""
    overrides: list[str] = get_args_parser().parse_known_intermixed_args(arguments)[0].overrides
    return overrides


@contextmanager
def hydra_context() -> Iterator[ConfigLoader]:
    """Hydra with conf/ at hand."""
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def compose_config(overrides: list[str]) -> DictConfig:
    refuse_renamed_overrides(overrides)
    try:
        return hydra.compose(CONFIG_NAME, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def _with_start(composed: DictConfig, words: list[str]) -> DictConfig:
    """With init_from, model.* are those of the weights to start from, but for those that `words` set."""
    if composed.init_from is None:
        return composed
    from reformer_dist.checkpoint.weights import (
        saved_model_config,  # loads torch, which other commands need not wait for
    )

    given = [word.lstrip("+") for word in words if word.lstrip("+").startswith("model.")]
    try:
        merged = OmegaConf.merge(
            composed, {"model": saved_model_config(composed.init_from)}, OmegaConf.from_dotlist(given)
        )
    except OmegaConfBaseException as error:
        raise ConfigError(f"init_from={composed.init_from}: {explain(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def to_run_config(composed: Any) -> RunConfig:
    """The real dataclasses, whose checks run as they are made. Raises ConfigError."""
    refuse_unknown(OmegaConf.to_container(composed, enum_to_str=True), RunConfig(), "")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, RunConfig)
    return config


def refuse_unknown(given: Any, known: Any, prefix: str) -> None:
    """Hydra's `+key=value` gets past the schema; a key that no dataclass has must not be dropped in silence."""
    if not is_dataclass(known):
        return
    names = {field.name for field in fields(known)}
    for key, value in given.items():
        refuse_renamed(f"{prefix}{key}", value)
        if key not in names:
            raise ConfigError(f"{prefix}{key}={value}: there is no such key{_suggest(key, type(known))}")
        refuse_unknown(value, getattr(known, key), f"{prefix}{key}.")


def run_config_from(saved: dict[str, Any], overrides: list[str]) -> RunConfig:
    """A saved configuration with `key=value` overrides, checked as at the start of a run. Raises ConfigError."""
    refuse_renamed_overrides(overrides)
    try:
        schema = OmegaConf.structured(RunConfig)
        merged = OmegaConf.merge(schema, translate_saved(saved), OmegaConf.from_dotlist(overrides))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    except YAMLError as error:
        raise ConfigError(f"{' '.join(overrides)}: a value is not valid YAML: {error}") from error
    return to_run_config(merged)


def plain(config: Any) -> Any:
    """A configuration as JSON can hold it: enums by name."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, list):
        return [plain(item) for item in config]
    return config


def to_yaml(config: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def explain(error: BaseException) -> str:
    """The innermost useful message, with the nearest known key where the key is unknown."""
    cause: BaseException | None = error
    found: OmegaConfBaseException | None = None
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            found = cause
        cause = cause.__cause__
    if found is None:
        return _explain_choice(str(error))
    first_line = (found.msg or str(found)).splitlines()[0]
    key = str(found.full_key or found.key or "")
    if key in RENAMED:  # in a yaml file; the value is unknown here
        return f"{key}: {RENAMED[key]}"
    if NO_LIST.search(first_line):
        return f"{key}: must be a list, such as {key}={_example(key)}"
    for wrong, right in WRONG_VALUES:
        if matched := wrong.match(first_line):
            return f"{key}={matched[1]}: {right.format(*matched.groups())}"
    named = first_line if not key or key in first_line else f"{key}: {first_line}"
    return named + _suggest(key, found.object_type)


def _explain_choice(message: str) -> str:
    """Hydra's message, but of a choice that a group does not have: not where Hydra looked for it."""
    found = NO_CHOICE.search(message)
    if found is None:
        return message
    group, choice, listed = found.groups()
    known = listed.split()
    near = difflib.get_close_matches(choice, known, n=1)
    return f"{group}={choice}: must be {one_of(known)}" + (f"; did you mean {near[0]}?" if near else "")


def _example(key: str) -> str:
    """A list that would do: that of the defaults, if they have one."""
    value: Any = RunConfig()
    for name in key.split("."):
        value = getattr(value, name, None)
    return f"[{','.join(map(str, plain(value)))}]" if isinstance(value, list) and value else "[a,b]"


def _suggest(key: str, owner: Any) -> str:
    if not (isinstance(owner, type) and is_dataclass(owner)):
        return ""
    known = [field.name for field in fields(owner)]
    last = key.rsplit(".", 1)[-1]
    if last in known:
        return ""
    near = difflib.get_close_matches(last, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; it knows {', '.join(known)}"
