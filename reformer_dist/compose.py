"""From conf/ and the command line to a RunConfig: Hydra composes, the dataclasses judge.

No yaml names Python code: there is no `_target_`, and the schema refuses keys that it does not know.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from reformer_dist.config import RunConfig
from reformer_dist.errors import ConfigError

CONFIG_NAME = "train"


def conf_folder() -> Path:
    """conf/ of the checkout that this package lies in, else the copy that the wheel installed."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "conf"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "conf"


def register_schema() -> None:
    ConfigStore.instance().store(name="schema", node=RunConfig)


def hydra_entry(task: Callable[[RunConfig], None]) -> None:
    """Runs `task` with the configuration that the command line describes, if it asks for a run.

    Raises ConfigError for a command line that describes none.
    """
    register_schema()
    # without it, Hydra would print errors in its own way and exit
    os.environ["HYDRA_FULL_ERROR"] = "1"
    composed: list[DictConfig] = []
    compose = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=CONFIG_NAME)
    try:
        compose(composed.append)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    if len(composed) > 1:
        raise ConfigError("--multirun: a command runs one job; start one command for each combination")
    if composed:  # --help, --cfg and the like describe no run
        task(to_run_config(composed[0]))


def to_run_config(composed: Any) -> RunConfig:
    """The real dataclasses, whose checks run as they are made. Raises ConfigError."""
    _refuse_unknown(OmegaConf.to_container(composed, enum_to_str=True), RunConfig(), "")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, RunConfig)
    return config


def _refuse_unknown(given: Any, known: Any, prefix: str) -> None:
    """Hydra's `+key=value` gets past the schema; a key that no dataclass has must not be dropped in silence."""
    if not is_dataclass(known):
        return
    names = {field.name for field in fields(known)}
    for key, value in given.items():
        if key not in names:
            raise ConfigError(f"{prefix}{key}={value}: there is no such key{_suggest(key, type(known))}")
        _refuse_unknown(value, getattr(known, key), f"{prefix}{key}.")


def run_config_from(saved: dict[str, Any], overrides: list[str]) -> RunConfig:
    """A saved configuration with `key=value` overrides, checked as at the start of a run. Raises ConfigError."""
    try:
        schema = OmegaConf.structured(RunConfig)
        merged = OmegaConf.merge(schema, saved, OmegaConf.from_dotlist(overrides))
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
        return str(error)
    first_line = (found.msg or str(found)).splitlines()[0]
    key = str(found.full_key or found.key or "")
    named = first_line if not key or key in first_line else f"{key}: {first_line}"
    return named + _suggest(key, found.object_type)


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
