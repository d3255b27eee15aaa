"""Documents from files and folders, in an order that depends on their names alone.

Documents are:

- each file of a folder, sorted by path, except hidden files, binary files (those that contain NUL) and hidden,
  `__pycache__`, `site-packages` and `dist-packages` folders; links to folders are not followed, and datasets that
  were written by this package are not read;
- each record of a `.jsonl`, `.ndjson`, `.json` (an array, or objects one after another), `.csv`, `.tsv`,
  `.parquet`, `.arrow` or `.feather` file, and of a data set that Hugging Face's `datasets` saved;
- a text file that is itself an input; a large one is cut at blank lines into sections of several MiB, whose
  concatenation is the file. The end of each is held out, and the rest keeps its order over a long range;
- each `.txt` member of a `.tar` file, such as a shard of WebDataset, and each record of members in the formats
  above; other members are skipped and links are not followed;
- the content of a `.gz`, `.zst`, `.xz` or `.bz2` file, whose name without that suffix determines the format;
  `.tgz` is `.tar.gz`.

Files in formats that hold text but are not read, such as PDF, and those whose syntax would be read as text, such
as FASTA, are errors unless they may be skipped. Skipped files are counted in a `SkippedFiles`, except hidden ones
and those of skipped folders.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from webdataset.tariterators import tar_file_iterator

from reformer_dist.data.format.dataset_layout import DATASET_FILE
from reformer_dist.data.prepare.columns import saved_table_files
from reformer_dist.data.prepare.formats import (
    RECORD_SUFFIXES,
    TEXT_RECORD_SUFFIXES,
    iterate_records,
    record_suffix,
    text_fields,
)
from reformer_dist.data.prepare.raw_files import (
    MAGIC_BYTES,
    PackedFileError,
    decompressed,
    naming_errors,
    open_raw,
    open_undecoded,
    peek,
    refuse_packed,
    uncompressed_name,
)
from reformer_dist.data.prepare.samples import RawSample
from reformer_dist.errors import DataError

SECTION_BYTES = 4 << 20
SKIPPED_DIRS = frozenset({"__pycache__", "site-packages", "dist-packages"})

FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn")
NOT_TEXT = {".ipynb": "is a notebook in JSON", **dict.fromkeys(FASTA_SUFFIXES, "is FASTA, which --fasta reads")}
"""Files that are text to an editor, but whose syntax is not what a model should learn."""
AS_TEXT_SUFFIXES = (*TEXT_RECORD_SUFFIXES, *NOT_TEXT)
"""Suffixes that TextOptions.as_text may hold."""
SNIFFED_SUFFIXES = ("", ".txt", ".text", ".log")
"""Of files in folders in which JSON lines are recognized."""
SNIFFED_BYTES = 1024

_JSON_OBJECT = re.compile(rb'\s*\{\s*"[^"\n]*"\s*:')
_BLANK_LINE = re.compile(rb"\n\r?\n")


class SkippedFiles(dict[str, tuple[int, str]]):
    """Skipped files: (count, name of the first) by kind."""

    def add(self, kind: str, name: str) -> None:
        count, first = self.get(kind, (0, name))
        self[kind] = (count + 1, first)

    def __str__(self) -> str:
        return "; ".join(f"{count:,} {kind}, such as {first}" for kind, (count, first) in self.items())


@dataclass(frozen=True)
class TextOptions:
    """Which files are read as text, and how."""

    suffixes: tuple[str, ...] = ()
    """Of the files of a folder to read (`.py` includes `.py.gz`); all if empty. Inputs are always read."""
    text_field: str = "text"
    """Field, or column, of a record that holds its text."""
    as_text: tuple[str, ...] = ()
    """Suffixes of AS_TEXT_SUFFIXES whose files are read as plain text."""
    skip_packed: bool = False
    """Skips files in formats that hold text but are not read."""
    section_bytes: int = SECTION_BYTES
    """Text files that are inputs are cut into sections of this size up to twice this size."""
    output: Path | None = None
    """Folder that is not read, although it may be inside an input."""


def read_text(
    paths: Iterable[str | Path], options: TextOptions | None = None, skipped: SkippedFiles | None = None
) -> Iterator[RawSample]:
    """Each document; names begin with the name of the input file or folder, without its path.

    Raises DataError if a path is missing, a file can't be read, a record has no text, an input is the output or a
    dataset, or there is no document at all.
    """
    inputs, options = [Path(path) for path in paths], options or TextOptions()
    skipped = SkippedFiles() if skipped is None else skipped
    n_files = n_documents = 0
    for path in inputs:
        for file, label in find_files(path, options, skipped):
            n_files += 1
            try:
                for document in _read_file(file, label, options, file != path, skipped):
                    n_documents += 1
                    yield document
            except PackedFileError as error:
                _skip_packed(error, str(file), options, skipped)
    if n_documents == 0:
        where = ", ".join(map(str, inputs))
        if options.suffixes and n_files == 0:
            raise DataError(f"no text: no file below {where} ends in {' or '.join(options.suffixes)}")
        raise DataError(f"no text in {where}" + (f"; skipped: {skipped}" if skipped else ""))


def read_bytes(
    paths: Iterable[str | Path], options: TextOptions | None = None, skipped: SkippedFiles | None = None
) -> Iterator[RawSample]:
    """The bytes of each file, whatever it is: binary, compressed or text. Which files: as `read_text`.

    Files are cut into sections of equal size, as large text files are. The end of each section of a file that is
    itself an input is held out. Raises DataError if a path is missing or nothing was found.
    """
    options, skipped = options or TextOptions(), SkippedFiles() if skipped is None else skipped
    n_documents = 0
    for path in map(Path, paths):
        for file, label in find_files(path, options, skipped):
            with open_undecoded(file) as content:
                n_sections = max(1, file.stat().st_size // options.section_bytes)
                length = -(-file.stat().st_size // n_sections)
                for number in range(n_sections):
                    name = label if n_sections == 1 else f"{label}#{number}"
                    yield RawSample(name, (content.read(length),), is_divisible=file == path)
                    n_documents += 1
    if n_documents == 0:
        raise DataError(f"no file in {', '.join(map(str, paths))}" + (f"; skipped: {skipped}" if skipped else ""))


def _skip_packed(error: PackedFileError, name: str, options: TextOptions, skipped: SkippedFiles) -> None:
    if not options.skip_packed:
        raise DataError(f"{error}, or leave such files out with --skip-unreadable") from error
    skipped.add("files in formats that can't be read", name)


def find_files(path: Path, options: TextOptions, skipped: SkippedFiles) -> Iterator[tuple[Path, str]]:
    """(file, name in the dataset) of each file of an input."""
    if path.is_dir():
        if options.output is not None and path.resolve() == options.output.resolve():
            raise DataError(f"--output {options.output}: is also an input; give a folder of its own")
        if _is_dataset(path):
            raise DataError(
                f"{path}: holds a dataset, not raw text; give its shards, {path}/*.tar, to read it again"
            )
        root = path.resolve().name
        for file in _walk_folder(path, options, skipped):
            yield file, f"{root}/{file.relative_to(path).as_posix()}"
    elif path.exists():
        yield path, path.name
    else:
        expected = f"inputs must be text, {', '.join(RECORD_SUFFIXES)}, .tar, compressed ones or folders of them"
        raise DataError(f"{path}: no such file or folder; {expected}")


def _walk_folder(folder: Path, options: TextOptions, skipped: SkippedFiles) -> Iterator[Path]:
    def raise_unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: folder can't be read ({error.strerror})") from error

    output = None if options.output is None else options.output.resolve()
    for parent, folders, names in os.walk(folder, onerror=raise_unreadable):
        saved = saved_table_files(Path(parent))
        if saved is not None:
            folders.clear()
            yield from saved
            continue
        folders[:] = sorted(name for name in folders if name not in SKIPPED_DIRS and not name.startswith("."))
        for path in [Path(parent, name) for name in folders]:
            if path.is_symlink():  # not followed by os.walk: it might be part of a cycle
                skipped.add("links to folders", str(path))
            elif _is_dataset(path) or path.resolve() == output:
                skipped.add("datasets, which are not read again", str(path))
                folders.remove(path.name)
        for name in sorted(names):
            path = Path(parent, name)
            suffixes = options.suffixes
            is_selected = not suffixes or name.endswith(suffixes) or uncompressed_name(name).endswith(suffixes)
            if not is_selected or name.startswith("."):
                continue
            if path.is_file():
                yield path
            else:
                skipped.add("broken links or devices", str(path))


def _is_dataset(folder: Path) -> bool:
    """Whether a folder holds a dataset that this package wrote."""
    try:
        return {"tokenizer", "splits"} <= json.loads((folder / DATASET_FILE).read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _read_file(
    path: Path, label: str, options: TextOptions, in_folder: bool, skipped: SkippedFiles
) -> Iterator[RawSample]:
    with open_raw(path) as file:
        _refuse_syntax(file, path.name, str(path), options, in_folder)
        if uncompressed_name(path.name).endswith(".tar"):
            yield from _tar_members(file, path, label, options, skipped)
        elif (suffix := _record_suffix(path.name, options)) is not None:
            yield from _read_records(file, suffix, label, str(path), options)
        elif in_folder:
            text = file.read()
            if b"\0" in text:
                skipped.add("binary files, which contain NUL", label)
            else:
                yield RawSample(label, (text,))
        else:
            yield from _sections(file, path, label, options.section_bytes)


def _refuse_syntax(file: IO[bytes], name: str, where: str, options: TextOptions, in_folder: bool) -> None:
    """Raises PackedFileError for a file whose syntax would be read as text: NOT_TEXT, and JSON lines."""
    inner = uncompressed_name(name)
    suffix = Path(inner).suffix
    if suffix in NOT_TEXT and suffix not in options.as_text:
        raise PackedFileError(f"{where}: {NOT_TEXT[suffix]}; --as-text {suffix} reads it as plain text")
    is_text = not inner.endswith((".tar", *RECORD_SUFFIXES)) and suffix not in options.as_text
    if is_text and (not in_folder or suffix in SNIFFED_SUFFIXES) and _JSON_OBJECT.match(peek(file, SNIFFED_BYTES)):
        raise PackedFileError(f"{where}: begins like JSON; give it a name that ends in .jsonl or .json")


def _record_suffix(name: str, options: TextOptions) -> str | None:
    suffix = record_suffix(name)
    return None if suffix in options.as_text else suffix


def _read_records(
    file: IO[bytes], suffix: str, label: str, where: str, options: TextOptions
) -> Iterator[RawSample]:
    try:
        for number, record in iterate_records(file, suffix, where, [options.text_field]):
            text = text_fields(record, [options.text_field], f"{where}:{number}")
            yield RawSample(f"{label}:{number}", tuple(text))
    except DataError as error:
        hint = "--text-field names another field"
        if suffix in AS_TEXT_SUFFIXES:
            hint += f", --as-text {suffix} reads {suffix} files as plain text"
        raise DataError(f"{error}; {hint}") from error


def _tar_members(
    file: IO[bytes], path: Path, label: str, options: TextOptions, skipped: SkippedFiles
) -> Iterator[RawSample]:
    for member in tar_file_iterator(file):
        name = str(member["fname"])
        where = f"{path}: {name}"
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{path}: a member is named {name!r}; names must be relative and without ..")
        try:
            yield from _read_member(member["data"], name, f"{label}/{name}", where, options, skipped)
        except PackedFileError as error:
            _skip_packed(error, where, options, skipped)


def _read_member(
    data: bytes, name: str, label: str, where: str, options: TextOptions, skipped: SkippedFiles
) -> Iterator[RawSample]:
    with naming_errors(where):
        content = decompressed(cast(IO[bytes], io.BytesIO(data)), name).read()
    refuse_packed(content[:MAGIC_BYTES], name, where)
    file = cast(IO[bytes], io.BufferedReader(io.BytesIO(content)))
    suffix = _record_suffix(name, options)
    if suffix is not None:
        yield from _read_records(file, suffix, label, where, options)
    elif uncompressed_name(name).endswith((".txt", *options.as_text)):
        _refuse_syntax(file, name, where, options, in_folder=True)
        yield RawSample(label, (content,))
    else:
        others = ", ".join(RECORD_SUFFIXES)
        skipped.add(f"members of .tar files that are neither .txt nor {others}", label)


def _sections(file: IO[bytes], path: Path, label: str, section_bytes: int) -> Iterator[RawSample]:
    """Consecutive sections of the same size, section_bytes to 2 * section_bytes; one, if the file is smaller."""
    size = path.stat().st_size
    target_bytes = max(section_bytes, -(-size // max(1, size // section_bytes)))
    rest = b""
    number = 0
    while True:
        window = rest + file.read(2 * target_bytes - len(rest))
        if not window:
            return
        if b"\0" in window:
            raise DataError(f"{path}: contains NUL bytes; it must be text")
        end = _section_end(window, target_bytes)
        is_whole = number == 0 and end == len(window)
        yield RawSample(label if is_whole else f"{label}#{number}", (window[:end],), is_divisible=True)
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
