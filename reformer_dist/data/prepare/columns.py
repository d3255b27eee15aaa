"""Tables in columns: Parquet, Arrow IPC files and streams, and data sets that Hugging Face's `datasets` saved."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from reformer_dist.data.prepare.raw_files import optional_package, peek
from reformer_dist.errors import DataError

COLUMN_SUFFIXES = (".parquet", ".arrow", ".feather")
ROWS_AT_A_TIME = 256
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"


def read_columns(
    file: IO[bytes], suffix: str, where: str, names: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values by name) of each row, some rows at a time. Raises DataError if a column is missing."""
    pyarrow = optional_package("pyarrow", "arrow", f"{where}: a {suffix} file")
    if isinstance(file, gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) or not file.seekable():
        raise DataError(f"{where}: is compressed as a whole; decompress it, since {suffix} files compress columns")
    try:
        schema, batches = _open_table(file, suffix)
        for name in names:
            if name not in schema.names:
                raise DataError(f"{where}: has no column {name!r}, but {', '.join(schema.names)}")
        number = 0
        for batch in batches(list(names)):
            for row in batch.select(list(names)).to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: can't be read ({error}); it must be a whole {suffix} file") from error


def _open_table(file: IO[bytes], suffix: str) -> tuple[Any, Any]:
    """(schema, function from names of columns to record batches)."""
    if suffix == ".parquet":
        parquet = optional_package("pyarrow.parquet", "arrow", "a .parquet file").ParquetFile(file)
        return parquet.schema_arrow, lambda names: parquet.iter_batches(ROWS_AT_A_TIME, columns=names)
    ipc = optional_package("pyarrow.ipc", "arrow", "an Arrow file")
    if peek(file).startswith(b"ARROW1"):
        reader = ipc.open_file(file)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        reader = ipc.open_stream(file)
        batches = iter(reader)
    pieces = (
        batch.slice(start, ROWS_AT_A_TIME)
        for batch in batches
        for start in range(0, batch.num_rows, ROWS_AT_A_TIME)
    )
    return reader.schema, lambda names: pieces


def saved_table_files(folder: Path) -> list[Path] | None:
    """Arrow files of a data set in the layout of `Dataset.save_to_disk`; None for other folders.

    Raises DataError for a folder of several splits, of which one must be chosen.
    """
    if (folder / SPLITS_FILE).is_file():
        splits = _read_json(folder / SPLITS_FILE).get("splits", [])
        choice = ", ".join(f"{folder}/{split}" for split in splits)
        raise DataError(
            f"{folder}: holds the splits of a data set; give one, and another as --heldout-from: {choice}"
        )
    if not (folder / STATE_FILE).is_file() or not (folder / "dataset_info.json").is_file():
        return None
    try:
        return [folder / str(each["filename"]) for each in _read_json(folder / STATE_FILE)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / STATE_FILE}: lists no _data_files; save the data set again") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read ({error})") from error
