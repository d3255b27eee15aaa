"""Documents that are token ids already: numpy arrays, and lists of integers in columns or fields of records."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.prepare.columns import saved_table_files
from reformer_dist.data.prepare.documents import SECTION_BYTES
from reformer_dist.data.prepare.formats import RECORD_SUFFIXES, iterate_records, record_suffix
from reformer_dist.data.prepare.raw_files import open_raw, read_counter
from reformer_dist.data.prepare.samples import ID_DTYPE, RawSample
from reformer_dist.errors import DataError

ARRAY_SUFFIXES = (".npy", ".npz")


def read_ids(
    paths: Iterable[Path], n_ids: int, field: str = "input_ids", section_bytes: int = SECTION_BYTES
) -> Iterator[RawSample]:
    """Sequences of ids 0 .. n_ids - 1: each row of a 2-d array, each list, and sections of 1-d arrays.

    A 1-d array is cut into sections of section_bytes up to twice that, 4 bytes per id, whose ends are held out.
    Raises DataError, which names file and place, for ids that are no integers in this range.
    """
    for path in paths:
        for file in _files(path) if path.is_dir() else [path]:
            if file.suffix.lower() in ARRAY_SUFFIXES:
                yield from _read_arrays(file, n_ids, section_bytes)
            elif record_suffix(file.name) is None:
                readable = ", ".join((*ARRAY_SUFFIXES, *RECORD_SUFFIXES))
                raise DataError(f"{file}: --ids reads {readable}, compressed or not; convert it to one of these")
            else:
                yield from _read_records(file, n_ids, field)


def _files(folder: Path) -> list[Path]:
    saved = saved_table_files(folder)
    found = saved if saved is not None else sorted(path for path in folder.rglob("*") if _is_readable(path))
    if not found:
        readable = ", ".join((*ARRAY_SUFFIXES, *RECORD_SUFFIXES))
        raise DataError(f"{folder}: holds no file of ids; their names must end in {readable}")
    return found


def _is_readable(path: Path) -> bool:
    return path.suffix.lower() in ARRAY_SUFFIXES or record_suffix(path.name) is not None


def _read_arrays(path: Path, n_ids: int, section_bytes: int) -> Iterator[RawSample]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = [(path.name, found)] if isinstance(found, np.ndarray) else None
        names = () if arrays else found.files
        for name, array in arrays or ((f"{path.name}/{name}", found[name]) for name in names):
            yield from _cut_array(array, name, f"{path.parent / name}", n_ids, section_bytes)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: can't be read ({error}); it must hold arrays of integers, without pickles"
        ) from error
    read_counter.n_bytes += path.stat().st_size


def _cut_array(array: NDArray[Any], name: str, where: str, n_ids: int, section_bytes: int) -> Iterator[RawSample]:
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        expected = "it must be [n] or [sequences, n] of integers"
        raise DataError(f"{where}: holds {list(array.shape)} of {array.dtype}; {expected}")
    if array.ndim == 2:
        for number, row in enumerate(array):
            yield RawSample(f"{name}:{number}", (_checked(row, f"{where}:{number}", n_ids),), is_ids=True)
        return
    n_sections = max(1, len(array) * ID_DTYPE.itemsize // section_bytes)
    length = -(-len(array) // n_sections)
    for number, start in enumerate(range(0, len(array), max(1, length))):
        ids = _checked(array[start : start + length], where, n_ids, start)
        label = name if n_sections == 1 else f"{name}#{number}"
        yield RawSample(label, (ids,), is_divisible=True, is_ids=True)


def _read_records(path: Path, n_ids: int, field: str) -> Iterator[RawSample]:
    with open_raw(path) as file:
        for number, record in iterate_records(file, record_suffix(path.name), str(path), [field]):
            where = f"{path}:{number}"
            values = record.get(field) if isinstance(record, dict) else None
            if not isinstance(values, list) or not all(type(value) is int for value in values):
                hint = "it must be a list of integers; --text-field names another field"
                raise DataError(f"{where}: field {field!r} is {values!r:.60}; {hint}")
            try:
                ids = np.array(values, dtype=np.int64)
            except OverflowError as error:
                raise DataError(f"{where}: holds an id beyond 64 bits; ids must be below {n_ids}") from error
            yield RawSample(f"{path.name}:{number}", (_checked(ids, where, n_ids),), is_ids=True)


def _checked(ids: NDArray[Any], where: str, n_ids: int, first: int = 0) -> bytes:
    """The ids as stored in a RawSample. first: index of the first of them, for the message."""
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= n_ids):
        place = int(np.argmax((ids < 0) | (ids >= n_ids)))
        expected = f"ids must be from 0 to {n_ids - 1}, as --ids {n_ids} says"
        raise DataError(f"{where}: id {int(ids[place])} at position {first + place}; {expected}")
    return ids.astype(ID_DTYPE).tobytes()
