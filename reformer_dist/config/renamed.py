"""Keys that had another name in earlier versions.

Old names are refused, with the new one in the message. Configurations saved by earlier versions are translated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reformer_dist.errors import ConfigError


@dataclass(frozen=True)
class Renamed:
    key: str
    values: Mapping[str, str] = field(default_factory=dict)
    """New value per old one, both in lower case as on a command line; other values are unchanged."""

    def new_value(self, old: Any) -> Any:
        return self.values.get(_format(old).lower(), old)

    def __str__(self) -> str:
        values = ", ".join(f"{new} for {old}" for old, new in self.values.items())
        return f"has been renamed; use {self.key}" + (f" ({values})" if values else "")


RENAMED: Mapping[str, Renamed] = {
    "parallel.merge_returns": Renamed("parallel.combine", {"true": "merged", "false": "per_round"}),
    "data.max_damaged_share": Renamed("data.max_damaged_fraction"),
    "task.mask_share": Renamed("task.mask_prob"),
    "model.attention_implementation": Renamed("model.attention_backend"),
    "model.hash_seed": Renamed("model.compat.hash_seed"),
    "model.bucket_factors": Renamed("model.compat.bucket_factors"),
    "model.chunk_wrap": Renamed("model.compat.chunk_wrap"),
    "model.local_chunk_len": Renamed("model.compat.local_chunk_len"),
    "model.local_chunks_before": Renamed("model.compat.local_chunks_before"),
    "model.local_chunks_after": Renamed("model.compat.local_chunks_after"),
    "model.axial_sum": Renamed("model.compat.axial_sum"),
    "model.attention_bias": Renamed("model.compat.attention_bias"),
    "model.merge_streams": Renamed("model.compat.merge_streams"),
}


def refuse_renamed(key: str, value: Any) -> None:
    """Raises ConfigError, which names the new key and value, if `key` is an old name."""
    if key in RENAMED:
        new = RENAMED[key]
        replacement = f"{new.key}={_format(new.new_value(value))}"
        raise ConfigError(f"{key}={_format(value)}: has been renamed; use {replacement}")


def refuse_renamed_overrides(overrides: list[str]) -> None:
    """refuse_renamed for each override `key=value`, `+key=value` or `~key` of a command line."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        refuse_renamed(key, value)


def translate_saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a saved configuration, of any version, with the keys and values of this one."""
    translated: dict[str, Any] = copy.deepcopy(dict(config))
    for old, new in RENAMED.items():
        group, name = old.split(".")
        values = translated.get(group)
        if isinstance(values, dict) and name in values:
            *groups, new_name = new.key.split(".")
            target = translated
            for subgroup in groups:
                target = target.setdefault(subgroup, {})
            target.setdefault(new_name, new.new_value(values.pop(name)))
    return translated


def _format(value: Any) -> str:
    """Formats a value as on a command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "name", value))
