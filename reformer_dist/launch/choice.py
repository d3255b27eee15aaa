"""The launcher that the overrides of a command other than reformer-train choose."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reformer_dist.config import LauncherConfig, LauncherKind
from reformer_dist.errors import ConfigError

GROUP = "launcher"


def is_of_launcher(override: str) -> bool:
    return override.partition("=")[0].lstrip("+").partition(".")[0] == GROUP


def take_local_launcher(command: str, overrides: Sequence[str]) -> tuple[LauncherConfig | None, list[str]]:
    """The launcher, if overrides choose launcher=local, and the other overrides. Raises ConfigError for others.

    command: its name, for messages.
    """
    words = [word for word in overrides if is_of_launcher(word)]
    rest = [word for word in overrides if not is_of_launcher(word)]
    kinds = [word.partition("=")[2] for word in words if word.startswith(f"{GROUP}=")]
    if not words or kinds == [LauncherKind.none.name]:
        return None, rest
    if kinds != [LauncherKind.local.name]:
        fix = f"{command} starts ranks with launcher=local, and is a rank under torchrun"
        raise ConfigError(f"{' '.join(words)}: {fix}")
    keys = [word.removeprefix(f"{GROUP}.") for word in words if word.startswith(f"{GROUP}.")]
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(LauncherConfig), OmegaConf.from_dotlist([*keys, "kind=local"])
        )
        launcher = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{' '.join(words)}: {str(error).splitlines()[0]}") from error
    assert isinstance(launcher, LauncherConfig)
    return launcher, rest
