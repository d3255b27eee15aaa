"""Every key of a run with its meaning, values and default, read from the dataclasses and their docstrings."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from reformer_dist.config.checks import one_of
from reformer_dist.config.keywords import nearest
from reformer_dist.config.run import RunConfig
from reformer_dist.errors import ConfigError

TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "a mapping"}
WIDTH = 100  # characters of a line of --explain


@dataclass(frozen=True)
class Key:
    """A key of the configuration."""

    name: str
    """In full, such as model.n_hashes; keys of the items of a list as optim.groups[].lr."""
    meaning: str
    values: str
    """Type, choices and bounds, in words; empty if `meaning` says it."""
    default: str
    """As on a command line."""
    choices: dict[str, str]
    """Meanings of those values that have one."""
    type: Any
    """Annotation, without None."""

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Group:
    """A group of keys: a dataclass of the configuration."""

    name: str
    """Such as model; empty for the keys outside of groups."""
    meaning: str
    keys: tuple[Key, ...]


@cache
def groups() -> dict[str, Group]:
    """All groups by name, in the order of RunConfig, whose own keys come last."""
    found = list(_groups(RunConfig, "", inspect.getdoc(RunConfig) or ""))
    return {group.name: group for group in [*found[1:], found[0]]}


@cache
def keys() -> dict[str, Key]:
    """All keys by their full names."""
    return {key.name: key for group in groups().values() for key in group.keys}


def nearest_keys(name: str) -> list[str]:
    """Keys that an unknown one may stand for: those of its last name, or else spelled like it."""
    known, (group, _, leaf) = [key for key in keys() if "[]" not in key], name.rpartition(".")
    same = [key for key in known if keys()[key].leaf == leaf]
    if same:
        return same
    siblings = [key.leaf for key in groups()[group].keys] if group in groups() else []
    closest = nearest(leaf, siblings)
    if closest:
        return [f"{group}.{closest}" if group else closest]
    leaves = get_close_matches(leaf, {keys()[key].leaf for key in known}, n=1, cutoff=0.75)
    return [key for key in known if keys()[key].leaf in leaves]


def describe(name: str, here: str | None = None) -> str:
    """Lines about a key or a group, as --explain prints them. Raises ConfigError for an unknown name.

    here: the value of a key on the command line, if it is worth a line.
    """
    if name in keys():
        return "\n".join(_describe_key(keys()[name], here))
    if name in groups():
        group = groups()[name]
        lines = [f"{name}.*" if name else "keys outside of groups", *_wrapped(group.meaning, 2)]
        for key in group.keys:
            lines += ["", f"{key.name}={key.default}", *_wrapped(key.meaning, 2)]
        return "\n".join(lines)
    closest = nearest_keys(name) or [near for near in [nearest(name, list(groups()))] if near]
    known = one_of([group for group in groups() if group])
    hint = f"did you mean {one_of(closest)}?" if closest else f"must be a key, such as model.n_hashes, or {known}"
    raise ConfigError(f"--explain={name}: there is no such key; {hint}")


def overview() -> str:
    """The groups, each with its meaning, and the keys outside of groups."""
    lines = []
    for group in groups().values():
        if group.name:
            lines += [f"{group.name}.*", *_wrapped(group.meaning, 2)]
    lines += [line for key in groups()[""].keys for line in (key.name, *_wrapped(key.meaning, 2))]
    return "\n".join(lines)


def _describe_key(key: Key, here: str | None) -> Iterator[str]:
    yield key.name
    yield from _wrapped(key.meaning, 2)
    if key.values:
        yield from _wrapped(f"values:  {key.values}", 2, hanging=9)
    for choice, meaning in key.choices.items():
        yield from _wrapped(f"{choice}: {meaning}", 11, hanging=2)
    yield f"  default: {key.default}"
    if here is not None:
        yield f"  here:    {here}"


def _wrapped(text: str, indent: int, hanging: int = 0) -> list[str]:
    first, rest = " " * indent, " " * (indent + hanging)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _groups(cls: type, prefix: str, meaning: str) -> Iterator[Group]:
    """The group of a dataclass, then those of its fields."""
    docs, hints = _docstrings(cls), get_type_hints(cls)
    own: list[Key] = []
    below: list[Group] = []
    for option in fields(cls):
        annotation, name = hints[option.name], f"{prefix}{option.name}"
        item = get_args(annotation)[0] if get_origin(annotation) is list else None
        if is_dataclass(annotation):
            assert isinstance(annotation, type)
            below += _groups(annotation, f"{name}.", inspect.getdoc(annotation) or "")
            continue
        own.append(_key(name, option, annotation, docs.get(option.name, "")))
        if is_dataclass(item):
            assert isinstance(item, type)
            below += _groups(item, f"{name}[].", inspect.getdoc(item) or "")
    yield Group(prefix.removesuffix("."), " ".join(meaning.split()), tuple(own))
    yield from below


def _key(name: str, option: Field[Any], annotation: Any, meaning: str) -> Key:
    made = option.default_factory() if option.default_factory is not MISSING else option.default
    arguments = get_args(annotation)
    kind = next(part for part in arguments if part is not type(None)) if type(None) in arguments else annotation
    bounds = option.metadata.get("bounds")
    values = ", ".join([_type(kind), *(bounds.words() if bounds else [])]) if kind is not Any else ""
    values += "; or null" if values and kind is not annotation else ""
    item = get_args(kind)[0] if get_origin(kind) is list else kind
    is_choice = isinstance(item, type) and issubclass(item, Enum)
    return Key(name, meaning, values, show(made), _docstrings(item) if is_choice else {}, kind)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is list:
        item = arguments[0]
        if is_dataclass(item) or item is str or get_origin(item) is dict:
            return {str: "a list of strings"}.get(item, "a list of mappings")
        return f"a list of {_type(item).removeprefix('a ')}{'s' if item in (int, float) else ''}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return one_of(list(annotation.__members__))
    return TYPES[origin or annotation]


def show(value: Any) -> str:
    """A value as on a command line."""
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    return str(value).lower() if isinstance(value, bool) else "''" if value == "" else str(value)


def _docstrings(cls: Any) -> dict[str, str]:
    """The docstrings below the fields of a dataclass, or below the members of an Enum, each as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for entry, below in zip(definition.body, definition.body[1:], strict=False):
        targets = [entry.target] if isinstance(entry, ast.AnnAssign) else getattr(entry, "targets", [])
        text = below.value if isinstance(below, ast.Expr) else None
        if targets and isinstance(text, ast.Constant) and isinstance(targets[0], ast.Name):
            found[targets[0].id] = " ".join(str(text.value).split())
    return found
