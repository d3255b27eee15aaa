"""Formats of records that hold texts by name: JSON lines, JSON, CSV, Parquet and Arrow."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from reformer_dist.data.format.dataset_layout import MAX_SAMPLE_BYTES
from reformer_dist.data.prepare.columns import COLUMN_SUFFIXES, read_columns
from reformer_dist.data.prepare.raw_files import uncompressed_name
from reformer_dist.errors import DataError

TEXT_RECORD_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv")
RECORD_SUFFIXES = (*TEXT_RECORD_SUFFIXES, *COLUMN_SUFFIXES)
JSON_CHUNK = 1 << 20
WHITESPACE_AND_COMMA = " \t\r\n,"


def record_suffix(name: str) -> str | None:
    """The suffix of RECORD_SUFFIXES that a file name has, without .gz or the like."""
    suffix = Path(uncompressed_name(name)).suffix
    return suffix if suffix in RECORD_SUFFIXES else None


def iterate_records(
    file: IO[bytes], suffix: str | None, where: str, names: Sequence[str]
) -> Iterator[tuple[int, Any]]:
    """(line or number, value) of each record of a file of this suffix; None, or an unknown one: of JSON lines.

    A .json file holds an array of records, or one after another. The first line of .csv and .tsv files names the
    columns. Of Parquet and Arrow files only the columns `names` are read. Raises DataError, which begins with
    `where`, if the file is broken, not in UTF-8, or lacks such a column.
    """
    try:
        if suffix in COLUMN_SUFFIXES:
            yield from read_columns(file, suffix, where, names)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(file, "," if suffix == ".csv" else "\t", where)
        elif suffix == ".json":
            yield from _read_json(file, where)
        else:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse_json(line, f"{where}:{number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 ({error.reason}); convert it to UTF-8") from error


def text_fields(record: Any, names: Sequence[str], where: str) -> list[bytes]:
    """Strings in the fields of a record, as UTF-8. Raises DataError if a field is missing or is not a string."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: holds {record!r:.60}; it must be an object with the field {names[0]!r}")
    for name in names:
        if name not in record:
            others = f", but {', '.join(map(str, record))}" if record else ""
            raise DataError(f"{where}: has no field {name!r}{others}")
        if not isinstance(record[name], str):
            raise DataError(f"{where}: field {name!r} is {record[name]!r:.60}; it must be a string")
    # JSON can encode an unpaired surrogate, which UTF-8 can't
    return [record[name].encode("utf-8", errors="replace") for name in names]


def _parse_json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not valid JSON ({error}); it must be a JSON object") from error


def _read_json(file: IO[bytes], where: str) -> Iterator[tuple[int, Any]]:
    """Values of an array, or one after another, without reading a whole file into memory."""
    decoder, reader = json.JSONDecoder(), codecs.getreader("utf-8-sig")(file)
    text, position, number = reader.read(JSON_CHUNK), 0, 0
    is_array = text.lstrip().startswith("[")
    if is_array:
        position = text.index("[") + 1
    while True:
        while position < len(text) and text[position] in WHITESPACE_AND_COMMA:
            position += 1
        if position == len(text):
            text, position = reader.read(JSON_CHUNK), 0
            if not text:
                break
            continue
        if is_array and text[position] == "]":
            if rest := (text[position + 1 :] + reader.read(JSON_CHUNK)).strip():
                raise DataError(f"{where}: is not valid JSON; {rest:.20} follows the array")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            remaining = text[position:]  # may be the beginning of a value
            more = reader.read(max(JSON_CHUNK, len(remaining))) if len(remaining) < MAX_SAMPLE_BYTES else ""
            if not more:
                after = f"after {number} records" if number else "from its first record on"
                raise DataError(f"{where}: is not valid JSON {after} ({error})") from error
            text, position = remaining + more, 0
            continue
        number += 1
        yield number, value
    if is_array:
        raise DataError(f"{where}: is not valid JSON; the array ends without ] after {number} records")


def _read_csv(file: IO[bytes], delimiter: str, where: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_SAMPLE_BYTES)  # 128 KiB by default
    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                columns = ", ".join(reader.fieldnames or [])
                raise DataError(f"{where}:{reader.line_num}: has more or fewer cells than its columns: {columns}")
            yield reader.line_num, record
    except csv.Error as error:
        raise DataError(f"{where}:{reader.line_num}: is not valid CSV ({error})") from error
