"""Documents from files and folders, in an order that depends on nothing but names.

What becomes a document:

- each file of a folder, sorted by path; hidden, `__pycache__`, `site-packages` and `dist-packages` folders,
  hidden files and binary files (those that contain NUL, as UTF-16 does) are left out, and links to folders are
  not followed;
- each line of a `.jsonl` file;
- a text file named by itself is cut at blank lines into pieces, since a single document can not be split into
  training and held-out text: into some 64 pieces, each of about 2 KiB at least and 64 KiB at most. The pieces
  join to exactly the file;
- each `.txt` member of a `.tar` file, such as a shard of WebDataset's, and each `.json` member, of which the same
  field is taken as of a line of `.jsonl`; other members are left out, and links lead nowhere;
- a `.gz` file is read as what it holds; `.tgz` is `.tar.gz`.

What is left out, but for what is hidden and for folders of programs, is counted in a `SkippedFiles`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from webdataset.tariterators import tar_file_iterator

from reformer_dist.errors import DataError

MIN_SECTION_BYTES = 2 << 10
MAX_SECTION_BYTES = 64 << 10
TARGET_SECTIONS = 64
SKIPPED_DIRS = frozenset({"__pycache__", "site-packages", "dist-packages"})

_BLANK_LINE = re.compile(rb"\n\r?\n")


class SkippedFiles(dict[str, tuple[int, str]]):
    """What was passed over: of each kind how many, and the name of the first."""

    def add(self, kind: str, name: str) -> None:
        count, first = self.get(kind, (0, name))
        self[kind] = (count + 1, first)

    def __str__(self) -> str:
        return "; ".join(f"{count:,} {kind}, such as {first}" for kind, (count, first) in self.items())


def read_documents(
    paths: Iterable[str | Path],
    suffixes: Sequence[str] = (),
    jsonl_field: str = "text",
    left_out: SkippedFiles | None = None,
) -> Iterator[tuple[str, bytes]]:
    """(name, text) of each document; a name begins with that of the file or folder, not with where it lies.

    `suffixes` limits which files of a folder are taken (`.py` also takes `.py.gz`); a file named by itself is
    always taken. `jsonl_field` is the field of a line that holds its text. Raises DataError for a path that
    is missing, a file that can't be read, a line that has no text, or where no document is found at all.
    """
    inputs, left_out = [Path(path) for path in paths], SkippedFiles() if left_out is None else left_out
    n_files = n_documents = 0
    for path in inputs:
        for file, label in _files_of(path, tuple(suffixes), left_out):
            n_files += 1
            for document in _documents_of(file, label, jsonl_field, file != path, left_out):
                n_documents += 1
                yield document
    if n_documents == 0:
        where = ", ".join(map(str, inputs))
        if suffixes and n_files == 0:
            raise DataError(f"no text: no file below {where} ends in {' or '.join(suffixes)}")
        raise DataError(f"no text in {where}" + (f"; left out: {left_out}" if left_out else ""))


def _files_of(path: Path, suffixes: tuple[str, ...], left_out: SkippedFiles) -> Iterator[tuple[Path, str]]:
    """Each file of an input, and what it is called."""
    if path.is_dir():
        root = path.resolve().name
        for file in _files_below(path, suffixes, left_out):
            yield file, f"{root}/{file.relative_to(path).as_posix()}"
    elif path.exists():
        yield path, path.name
    else:
        right = "inputs must be text, .jsonl, .tar, .gz or folders of text"
        raise DataError(f"{path}: no such file or folder; {right}")


def _files_below(folder: Path, suffixes: tuple[str, ...], left_out: SkippedFiles) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_DIRS and not name.startswith("."))
        for name in folders:
            if Path(parent, name).is_symlink():  # which os.walk does not follow: it might lead round in a circle
                left_out.add("links to folders", str(Path(parent, name)))
        for name in sorted(names):
            path = Path(parent, name)
            wanted = not suffixes or name.endswith(suffixes) or _unzipped(name).endswith(suffixes)
            if not wanted or name.startswith("."):
                continue
            if path.is_file():
                yield path
            else:
                left_out.add("links that lead nowhere, or devices", str(path))


def _unzipped(name: str) -> str:
    """x.tar for x.tar.gz and x.tgz."""
    return name.removesuffix(".tgz") + ".tar" if name.endswith(".tgz") else name.removesuffix(".gz")


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename}: folder can't be read ({error.strerror})") from error


def _open(path: Path) -> IO[bytes]:
    # gzip's reader has all that is used of IO[bytes], which its type doesn't say
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _documents_of(
    path: Path, label: str, jsonl_field: str, in_folder: bool, left_out: SkippedFiles
) -> Iterator[tuple[str, bytes]]:
    name = _unzipped(path.name)
    try:
        with _open(path) as file:
            if name.endswith(".jsonl"):
                yield from _lines(file, path, label, jsonl_field)
            elif name.endswith(".tar"):
                yield from _members(file, path, label, jsonl_field, left_out)
            elif in_folder:
                text = file.read()
                if b"\0" in text:
                    left_out.add("binary files, which contain NUL", label)
                else:
                    yield label, text
            else:
                aim = min(max(path.stat().st_size // TARGET_SECTIONS, MIN_SECTION_BYTES), MAX_SECTION_BYTES)
                yield from _pieces(file, path, label, aim)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: can't be read ({error})") from error


def _lines(file: IO[bytes], path: Path, label: str, field: str) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        yield f"{label}:{number}", _field_of(line, field, f"{path}:{number}")


def _members(
    file: IO[bytes], path: Path, label: str, field: str, left_out: SkippedFiles
) -> Iterator[tuple[str, bytes]]:
    for member in tar_file_iterator(file):
        name = str(member["fname"])
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{path}: a member is named {name!r}; names must be relative and without ..")
        if name.endswith(".txt"):
            yield f"{label}/{name}", member["data"]
        elif name.endswith(".json"):
            yield f"{label}/{name}", _field_of(member["data"], field, f"{path}: {name}")
        else:
            left_out.add("members of .tar files that are neither .txt nor .json", f"{label}/{name}")


def _field_of(content: bytes, field: str, where: str) -> bytes:
    """The text in a field of a JSON object."""
    try:
        record = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error}); it must be a JSON object") from error
    if isinstance(record, dict) and field not in record:
        others = f", but {', '.join(record)}; --jsonl-field names another" if record else ""
        raise DataError(f"{where}: has no field {field!r}{others}")
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {text!r}; it must hold the text, as a string")
    # JSON can spell half of a surrogate pair, which no UTF-8 text holds
    return text.encode("utf-8", errors="replace")


def _pieces(file: IO[bytes], path: Path, label: str, aim: int) -> Iterator[tuple[str, bytes]]:
    """Consecutive pieces of `aim` to 2 * `aim` bytes."""
    rest = b""
    number = 0
    while True:
        window = rest + file.read(2 * aim - len(rest))
        if not window:
            return
        if b"\0" in window:
            raise DataError(f"{path}: contains NUL bytes; it must be text")
        end = _piece_end(window, aim)
        yield f"{label}#{number}", window[:end]
        rest = window[end:]
        number += 1


def _piece_end(window: bytes, aim: int) -> int:
    """Where the first piece of the window ends: at a blank line, else a line, else a character."""
    blank = _BLANK_LINE.search(window, aim - 1)
    if blank is not None:
        return blank.end()
    if len(window) < 2 * aim:
        return len(window)
    line_end = window.rfind(b"\n") + 1
    if line_end > 0:
        return line_end
    end = len(window)
    while end > len(window) - 4 and window[end - 1] & 0xC0 == 0x80:
        end -= 1
    # what starts a character of several bytes goes with the rest of it
    return end - 1 if window[end - 1] >= 0xC0 else len(window)
