"""Command lines of reformer-train in Hydra's syntax: flags, overrides, and where a user's own yaml files are.

A yaml file may be shared, so it must not run code. Hydra calls what its own settings name (callbacks, launchers,
handlers of logging, modules to search): they are taken from conf/train.yaml only.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from reformer_dist.config import RunConfig
from reformer_dist.config.renamed import refuse_renamed_overrides
from reformer_dist.errors import ConfigError
from reformer_dist.run.whole_numbers import with_whole_numbers

CONFIG_NAME = "train"
OWN_FILES = "--config-dir FOLDER experiment=NAME reads FOLDER/experiment/NAME.yaml"
# filled in by Hydra itself; none of it names code
FILLED_IN = ("overrides", "runtime", "mode")
FILLED_IN_JOB = ("name", "override_dirname", "id", "num", "config_name")
# raised for yaml files that Hydra can't read or merge, besides its own exceptions
FILE_ERRORS = (
    OmegaConfBaseException,
    YAMLError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    RecursionError,
)


@dataclass(frozen=True)
class ConfigFiles:
    """Where yaml files are read from, beside conf/."""

    folder: str | None = None
    """--config-dir: a folder with groups of its own, such as experiment/."""
    name: str = CONFIG_NAME
    """--config-name: the root file, which has `train` in its defaults."""

    def arguments(self) -> list[str]:
        """The flags that name these files on a command line."""
        folder = [f"--config-dir={self.folder}"] if self.folder is not None else []
        return [*folder, *([f"--config-name={self.name}"] if self.name != CONFIG_NAME else [])]


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line of reformer-train."""

    overrides: list[str]
    files: ConfigFiles
    multirun: bool
    shows: bool
    """Whether it asks for information, such as --help or --cfg, instead of a run. Also if a flag is unknown."""
    completes: bool
    """Whether a shell asks for completions of an unfinished command line."""


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Raises ConfigError for flags of Hydra that would replace conf/ or unpickle a file."""
    parsed, unknown = get_args_parser().parse_known_intermixed_args(list(arguments))
    if parsed.config_path is not None:
        fix = f"use --config-dir={parsed.config_path}, whose files are added to it"
        raise ConfigError(f"--config-path={parsed.config_path}: would replace conf/, which has all groups; {fix}")
    if parsed.experimental_rerun is not None:
        problem = "is a pickle, which can run arbitrary code; repeat the command line of the run instead"
        raise ConfigError(f"--experimental-rerun={parsed.experimental_rerun}: {problem}")
    completes = parsed.shell_completion
    shows = unknown or parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or completes
    name = (parsed.config_name or CONFIG_NAME).removesuffix(".yaml")
    files = ConfigFiles(parsed.config_dir, name)
    return CommandLine(list(parsed.overrides), files, parsed.multirun, bool(shows), completes)


def conf_folder() -> Path:
    """conf/ of the checkout that contains this package, or the copy installed by the wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "conf"


@contextmanager
def hydra_context(files: ConfigFiles | None = None) -> Iterator[ConfigLoaderImpl]:
    """Initializes Hydra with conf/, the schema and the user's files. Raises ConfigError if those can't be used."""
    files = files or ConfigFiles()
    ConfigStore.instance().store(name="schema", node=RunConfig)
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        if files.folder is not None:
            _require_own_names(files.folder)
            path = loader.get_search_path()
            anchor = SearchPathQuery(provider="schema")
            path.prepend("command-line", f"file://{Path(files.folder).absolute()}", anchor)
            loader.repository.initialize_sources(path)
        _check_root(files, loader)
        yield loader


def _require_own_names(folder: str) -> None:
    """Hydra reads the file of conf/ if both have one of the same name, and would ignore the user's."""
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir={folder}: is not a folder; {OWN_FILES}")
    for path in sorted(conf_folder().rglob("*.yaml")):
        name = path.relative_to(conf_folder())
        own = Path(folder) / name
        if own.is_file() and not own.samefile(path):
            raise ConfigError(f"--config-dir={folder}: {name} has the name of a file of conf/; rename it")


def _check_root(files: ConfigFiles, loader: ConfigLoaderImpl) -> None:
    """The root file exists, and names no module to search; Hydra would import it as it loads the file."""
    try:
        loaded = loader.repository.load_config(files.name)
    except FILE_ERRORS as error:
        raise ConfigError(f"--config-name={files.name}: {describe_file_error(error)}") from error
    if loaded is None:
        folders = f"conf/ or {files.folder}" if files.folder is not None else "conf/; --config-dir adds a folder"
        raise ConfigError(f"--config-name={files.name}: there is no {files.name}.yaml in {folders}")
    if not isinstance(loaded.config, DictConfig):
        raise ConfigError(f"--config-name={files.name}: must be a mapping of keys to values")
    if "hydra" in loaded.config and OmegaConf.select(loaded.config, "hydra.searchpath") is not None:
        raise ConfigError(f"--config-name={files.name}: sets hydra.searchpath; use --config-dir instead")


def describe_file_error(error: BaseException) -> str:
    """A library's message about a yaml file, in one line."""
    problem = "it refers to itself" if isinstance(error, RecursionError) else " ".join(str(error).split())[:400]
    return f"a yaml file can't be read: {problem}"


def parse_overrides(words: Sequence[str], loader: ConfigLoaderImpl | None = None) -> list[Override]:
    """Overrides in Hydra's grammar. Raises ConfigError, also for settings of Hydra.

    loader: resolves the options of `group=glob(*)`.
    """
    refuse_renamed_overrides(list(words))
    try:
        parsed: list[Override] = OverridesParser.create(config_loader=loader).parse_overrides(list(words))
    except (HydraException, ValueError, RecursionError) as error:  # such as a number of thousands of digits
        raise ConfigError(f"{shlex.join(words)[:400]}: {str(error).splitlines()[0]}") from error
    for word, override in zip(words, parsed, strict=True):
        if override.key_or_group.partition(".")[0].partition("/")[0] == "hydra":
            fix = "a sweep has sweep=..., and processes have launcher=..."
            raise ConfigError(f"{word}: settings of Hydra are those of conf/train.yaml; {fix}")
    return parsed


def as_hydra_reads(words: Sequence[str], loader: ConfigLoaderImpl) -> list[str]:
    """Overrides as Hydra reads them: `~group`, which leaves the group's file out, for `group=null`; 1000 for 1e3.

    Raises ConfigError.
    """
    parsed = parse_overrides(words, loader)
    words = with_whole_numbers(words)
    chosen: dict[str, str] = {}
    others = []
    for word, override in zip(words, parsed, strict=True):
        key, value = override.get_key_element(), override.value()
        is_choice = loader.repository.group_exists(override.key_or_group) and not isinstance(value, dict)
        if not is_choice or override.is_delete() or override.is_sweep_override():
            others.append(word)
        elif value is None and not override.is_add():
            chosen[key] = f"~{key}"
        elif isinstance(value, str | list) and value:
            chosen[key] = word  # the last choice wins
        else:
            raise ConfigError(f"{word}: must be the name of a file of the group {override.key_or_group}, or null")
    return [*others, *chosen.values()]


def compose_safely(words: Sequence[str], files: ConfigFiles) -> DictConfig:
    """The composed configuration without Hydra's settings. Calls nothing that a file names.

    Raises HydraException, and ConfigError if a file has settings of Hydra.
    """
    if files.name != CONFIG_NAME and OmegaConf.get_type(hydra.compose(files.name)) is not RunConfig:
        fix = "begin it with `defaults: [train, _self_]`"
        raise ConfigError(f"--config-name={files.name}: does not have the keys of a run; {fix}")
    composed = hydra.compose(files.name, list(words), return_hydra_config=True)
    settings, expected = _hydra_settings(composed), _expected_settings(conf_folder())
    for key in sorted(settings.keys() | expected.keys()):
        if settings.get(key) != expected.get(key):
            fix = "settings of Hydra can name code to run; leave `hydra` out of the file"
            raise ConfigError(f"hydra.{key}={settings.get(key)}: set by a yaml file; {fix}")
    with open_dict(composed):
        del composed["hydra"]
    return composed


@cache
def _expected_settings(conf: Path) -> dict[str, Any]:
    """Hydra's settings in conf/train.yaml, without any group, whose files might come from elsewhere."""
    defaults = OmegaConf.load(conf / f"{CONFIG_NAME}.yaml").defaults
    groups = [str(group) for entry in defaults if isinstance(entry, DictConfig) for group in entry]
    without = [f"~{group}" for group in groups if not group.startswith("override ")]
    return _hydra_settings(hydra.compose(CONFIG_NAME, without, return_hydra_config=True))


def _hydra_settings(composed: DictConfig) -> dict[str, Any]:
    settings = OmegaConf.to_container(composed.hydra, resolve=False)
    assert isinstance(settings, dict)
    kept = {str(key): value for key, value in settings.items() if key not in FILLED_IN}
    kept["job"] = {key: value for key, value in kept["job"].items() if key not in FILLED_IN_JOB}
    return kept
