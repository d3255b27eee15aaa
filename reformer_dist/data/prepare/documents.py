"""Documents from files and folders, in an order that depends on their names alone.

Documents are:

- each file of a folder, sorted by path, except hidden files, binary files (those that contain NUL, as UTF-16 does)
  and hidden, `__pycache__`, `site-packages` and `dist-packages` folders; links to folders are not followed;
- each line of a `.jsonl` file;
- sections of a text file that is itself an input, cut at blank lines since a single document could not be split
  into training and held-out text: about 64 sections of 2 to 64 KiB each, whose concatenation is the file;
- each `.txt` member of a `.tar` file, such as a shard of WebDataset, and the text field of each `.json` member;
  other members are skipped and links are not followed;
- the content of a `.gz` file, whose name without `.gz` determines the format; `.tgz` is `.tar.gz`.

Skipped files are counted in a `SkippedFiles`, except hidden ones and those of skipped folders.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from webdataset.tariterators import tar_file_iterator

from reformer_dist.errors import DataError

MIN_SECTION_BYTES = 2 << 10
MAX_SECTION_BYTES = 64 << 10
TARGET_SECTIONS = 64
SKIPPED_DIRS = frozenset({"__pycache__", "site-packages", "dist-packages"})

JSONL_HINT = "; --jsonl-field names another"
_BLANK_LINE = re.compile(rb"\n\r?\n")


class SkippedFiles(dict[str, tuple[int, str]]):
    """Skipped files: (count, name of the first) by kind."""

    def add(self, kind: str, name: str) -> None:
        count, first = self.get(kind, (0, name))
        self[kind] = (count + 1, first)

    def __str__(self) -> str:
        return "; ".join(f"{count:,} {kind}, such as {first}" for kind, (count, first) in self.items())


def read_documents(
    paths: Iterable[str | Path],
    suffixes: Sequence[str] = (),
    jsonl_field: str = "text",
    skipped: SkippedFiles | None = None,
) -> Iterator[tuple[str, bytes]]:
    """(name, text) of each document; names begin with the name of the input file or folder, without its path.

    suffixes: of the files of a folder to read (`.py` includes `.py.gz`); files among `paths` are always read.
    jsonl_field: field of a JSON object that holds its text. Raises DataError if a path is missing, a file can't be
    read, a line has no text, or there is no document at all.
    """
    inputs, skipped = [Path(path) for path in paths], SkippedFiles() if skipped is None else skipped
    n_files = n_documents = 0
    for path in inputs:
        for file, label in _find_files(path, tuple(suffixes), skipped):
            n_files += 1
            for document in _read_file(file, label, jsonl_field, file != path, skipped):
                n_documents += 1
                yield document
    if n_documents == 0:
        where = ", ".join(map(str, inputs))
        if suffixes and n_files == 0:
            raise DataError(f"no text: no file below {where} ends in {' or '.join(suffixes)}")
        raise DataError(f"no text in {where}" + (f"; skipped: {skipped}" if skipped else ""))


def _find_files(path: Path, suffixes: tuple[str, ...], skipped: SkippedFiles) -> Iterator[tuple[Path, str]]:
    """(file, name in the dataset) of each file of an input."""
    if path.is_dir():
        root = path.resolve().name
        for file in _walk_folder(path, suffixes, skipped):
            yield file, f"{root}/{file.relative_to(path).as_posix()}"
    elif path.exists():
        yield path, path.name
    else:
        expected = "inputs must be text, .jsonl, .tar, .gz or folders of text"
        raise DataError(f"{path}: no such file or folder; {expected}")


def _walk_folder(folder: Path, suffixes: tuple[str, ...], skipped: SkippedFiles) -> Iterator[Path]:
    def raise_unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: folder can't be read ({error.strerror})") from error

    for parent, folders, names in os.walk(folder, onerror=raise_unreadable):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_DIRS and not name.startswith("."))
        for name in folders:
            if Path(parent, name).is_symlink():  # not followed by os.walk: it might be part of a cycle
                skipped.add("links to folders", str(Path(parent, name)))
        for name in sorted(names):
            path = Path(parent, name)
            is_selected = not suffixes or name.endswith(suffixes) or _uncompressed_name(name).endswith(suffixes)
            if not is_selected or name.startswith("."):
                continue
            if path.is_file():
                yield path
            else:
                skipped.add("broken links or devices", str(path))


def _uncompressed_name(name: str) -> str:
    """x.tar for x.tar.gz or x.tgz."""
    return name.removesuffix(".tgz") + ".tar" if name.endswith(".tgz") else name.removesuffix(".gz")


@contextmanager
def open_raw(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file, decompressing .gz. Raises DataError if it, or the tar file that it is, can't be read."""
    try:
        # gzip's reader implements what is used of IO[bytes], but is not typed so
        with cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: can't be read ({error})") from error


def _read_file(
    path: Path, label: str, jsonl_field: str, in_folder: bool, skipped: SkippedFiles
) -> Iterator[tuple[str, bytes]]:
    name = _uncompressed_name(path.name)
    with open_raw(path) as file:
        if name.endswith(".jsonl"):
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{label}:{number}", json_fields(line, [jsonl_field], f"{path}:{number}", JSONL_HINT)[0]
        elif name.endswith(".tar"):
            yield from _tar_members(file, path, label, jsonl_field, skipped)
        elif in_folder:
            text = file.read()
            if b"\0" in text:
                skipped.add("binary files, which contain NUL", label)
            else:
                yield label, text
        else:
            target_bytes = min(max(path.stat().st_size // TARGET_SECTIONS, MIN_SECTION_BYTES), MAX_SECTION_BYTES)
            yield from _sections(file, path, label, target_bytes)


def _tar_members(
    file: IO[bytes], path: Path, label: str, field: str, skipped: SkippedFiles
) -> Iterator[tuple[str, bytes]]:
    for member in tar_file_iterator(file):
        name = str(member["fname"])
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{path}: a member is named {name!r}; names must be relative and without ..")
        if name.endswith(".txt"):
            yield f"{label}/{name}", member["data"]
        elif name.endswith(".json"):
            yield f"{label}/{name}", json_fields(member["data"], [field], f"{path}: {name}", JSONL_HINT)[0]
        else:
            skipped.add("members of .tar files that are neither .txt nor .json", f"{label}/{name}")


def json_fields(content: bytes, names: Sequence[str], where: str, hint: str = "") -> list[bytes]:
    """Strings in the fields of a JSON object, as UTF-8.

    Raises DataError if a field is missing or is not a string. hint: follows the names of the existing fields.
    """
    try:
        record = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error}); it must be a JSON object") from error
    for name in names:
        if isinstance(record, dict) and name not in record:
            others = f", but {', '.join(record)}{hint}" if record else ""
            raise DataError(f"{where}: has no field {name!r}{others}")
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise DataError(f"{where}: field {name!r} is {value!r}; it must be a string")
    # JSON can encode an unpaired surrogate, which UTF-8 can't
    return [record[name].encode("utf-8", errors="replace") for name in names]


def _sections(file: IO[bytes], path: Path, label: str, target_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Consecutive sections of target_bytes to 2 * target_bytes."""
    rest = b""
    number = 0
    while True:
        window = rest + file.read(2 * target_bytes - len(rest))
        if not window:
            return
        if b"\0" in window:
            raise DataError(f"{path}: contains NUL bytes; it must be text")
        end = _section_end(window, target_bytes)
        yield f"{label}#{number}", window[:end]
        rest = window[end:]
        number += 1


def _section_end(window: bytes, target_bytes: int) -> int:
    """End of the first section of the window: at a blank line, else at a line, else at a character."""
    blank = _BLANK_LINE.search(window, target_bytes - 1)
    if blank is not None:
        return blank.end()
    if len(window) < 2 * target_bytes:
        return len(window)
    line_end = window.rfind(b"\n") + 1
    if line_end > 0:
        return line_end
    end = len(window)
    while end > len(window) - 4 and window[end - 1] & 0xC0 == 0x80:
        end -= 1
    # the first byte of a multi-byte character stays with the rest of it
    return end - 1 if window[end - 1] >= 0xC0 else len(window)
