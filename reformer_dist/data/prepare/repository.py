"""Repositories as documents: all text files of a folder, one after another, each below a line with its path."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from reformer_dist.data.prepare.documents import SkippedFiles, TextOptions, find_files
from reformer_dist.data.prepare.raw_files import MAGIC_BYTES, PackedFileError, open_undecoded, refuse_packed
from reformer_dist.data.prepare.samples import RawSample
from reformer_dist.errors import DataError

FILE_ORDERS = ("path", "imports")
HEADER = "# path: {}\n"
_PYTHON = re.compile(
    r"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]+(?:\(([^)]*)\)|([\w, \t]*))|import[ \t]+([\w., \t]+))", re.M
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.M)
_SCRIPT = re.compile(r"""(?:\bfrom|\brequire\(|\bimport\(?)\s*['"](\.[^'"\n]+)['"]""")
_SCRIPT_SUFFIXES = (".js", ".ts", ".jsx", ".tsx", ".mjs", ".vue")


def read_repositories(
    paths: Iterable[Path],
    options: TextOptions | None = None,
    skipped: SkippedFiles | None = None,
    order: str = "path",
) -> Iterator[RawSample]:
    """One document per folder. Files are chosen as by `read_text`; those that are not text are skipped.

    order: "path", or "imports" for files after those that they import, as far as there is no cycle. Raises
    DataError if an input is no folder or holds no text.
    """
    options, skipped = options or TextOptions(), SkippedFiles() if skipped is None else skipped
    for path in paths:
        if not path.is_dir():
            raise DataError(f"{path}: is no folder; with --repository each input is the folder of a repository")
        files = dict(_read_files(path, options, skipped))
        if not files:
            raise DataError(f"{path}: holds no text" + (f"; skipped: {skipped}" if skipped else ""))
        names = in_import_order(files) if order == "imports" else sorted(files)
        parts = [HEADER.format(name).encode("utf-8", "surrogateescape") + files[name] for name in names]
        parts = [part if part.endswith(b"\n") else part + b"\n" for part in parts]
        yield RawSample(path.resolve().name, (b"".join(parts),), part_sizes=tuple(map(len, parts)))


def _read_files(folder: Path, options: TextOptions, skipped: SkippedFiles) -> Iterator[tuple[str, bytes]]:
    for path, label in find_files(folder, options, skipped):
        with open_undecoded(path) as file:
            text = file.read()
        try:
            refuse_packed(text[:MAGIC_BYTES], path.name, str(path))
        except PackedFileError:
            skipped.add("files in formats that can't be read", label)
            continue
        if b"\0" in text:
            skipped.add("binary files, which contain NUL", label)
        elif text:
            yield path.relative_to(folder).as_posix(), text


def in_import_order(files: Mapping[str, bytes]) -> list[str]:
    """Names of files, each after those that it imports (Python), includes (C) or requires (JavaScript).

    Otherwise, and within a cycle, in the order of their paths.
    """
    modules = _modules(files)
    ordered: dict[str, None] = {}
    begun: set[str] = set()
    for name in sorted(files):
        stack = [(name, iter(_imports(name, files, modules)))] if name not in begun else []
        begun.add(name)
        while stack:
            current, others = stack[-1]
            other = next((each for each in others if each not in begun), None)
            if other is None:
                ordered[current] = None
                stack.pop()
            else:
                begun.add(other)
                stack.append((other, iter(_imports(other, files, modules))))
    return list(ordered)


def _modules(files: Iterable[str]) -> dict[str, str]:
    """Files by the names under which Python may import them: every end of their paths, if it is the only one."""
    found: dict[str, set[str]] = {}
    for name in files:
        path = PurePosixPath(name)
        if path.suffix == ".py":
            parts = path.parent.parts if path.stem == "__init__" else path.with_suffix("").parts
            for first in range(len(parts)):
                found.setdefault(".".join(parts[first:]), set()).add(name)
    return {module: next(iter(names)) for module, names in found.items() if len(names) == 1}


def _imports(name: str, files: Mapping[str, bytes], modules: Mapping[str, str]) -> list[str]:
    text, folder = files[name].decode("utf-8", "replace"), posixpath.dirname(name)
    found: set[str | None] = set()
    if name.endswith(".py"):
        for match in _PYTHON.finditer(text):
            found |= {modules.get(module) for module in _python_modules(match, folder)}
    elif name.endswith(_SCRIPT_SUFFIXES):
        for match in _SCRIPT.finditer(text):
            target = posixpath.normpath(posixpath.join(folder, match[1]))
            ends = ("", *_SCRIPT_SUFFIXES, *(f"/index{suffix}" for suffix in _SCRIPT_SUFFIXES))
            found.add(next((target + end for end in ends if target + end in files), None))
    else:
        for match in _INCLUDE.finditer(text):
            places = (posixpath.normpath(posixpath.join(folder, match[1])), match[1], f"include/{match[1]}")
            found.add(next((place for place in places if place in files), None))
    return sorted(each for each in found if each is not None and each != name)


def _python_modules(match: re.Match[str], folder: str) -> Iterator[str]:
    base, in_parentheses, names, plain = match.groups()
    if plain:
        yield from (word.split()[0] for word in plain.split(",") if word.split())
        return
    n_dots = len(base) - len(base.lstrip("."))
    if n_dots:
        parents = folder.split("/") if folder else []
        kept = parents[: len(parents) - (n_dots - 1)]
        base = ".".join([*kept, *filter(None, base.lstrip(".").split("."))])
    yield base
    yield from (f"{base}.{word.split()[0]}" for word in (in_parentheses or names or "").split(",") if word.split())
