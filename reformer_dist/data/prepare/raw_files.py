"""Raw files: decompression, formats that are recognized but not read, and the bytes read so far."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any, cast

from reformer_dist.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
MAGIC_BYTES = 32
ZSTD_CHUNK = 16 << 10  # of compressed bytes: bounds what is decompressed at once
ZSTD_WINDOW = 1 << 31  # `zstd --long=31`

PACKED_FORMATS = {
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "LZ4",
    b"PK\x03\x04": "a ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"Obj\x01": "Avro",
    b"\x89HDF\r\n": "HDF5",
    b"SQLite format 3\0": "SQLite",
    b"%PDF-": "PDF",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x93NUMPY": "a numpy array",
}
"""Formats that hold text or ids, by their first bytes."""
READ_AS = {
    "Zstandard": (".zst",),
    "gzip": (".gz", ".tgz"),
    "xz": (".xz",),
    "bzip2": (".bz2",),
    "Parquet": (".parquet",),
    "Arrow": (".arrow", ".feather"),
}
"""Suffixes of names by which these formats are read."""
COLUMN_FORMATS = ("Parquet", "Arrow")
PACKED_SUFFIXES = (
    *(".lzma", ".lz4", ".br", ".snappy", ".zip", ".7z", ".rar"),
    *(".avro", ".orc", ".npy", ".npz"),
)


class PackedFileError(DataError):
    """A file holds text in a format that is not read."""


class ReadCounter:
    """Bytes of raw files that this process has read, compressed as they are: the measure of progress."""

    def __init__(self) -> None:
        self.n_bytes = 0


read_counter = ReadCounter()


class _CountedFile(io.FileIO):
    """A file that counts each of its bytes once, and counts all of them when it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._counted, self._size = 0, path.stat().st_size

    def readinto(self, buffer: Any, /) -> int | None:
        n_read = super().readinto(buffer)
        self._count(self.tell())
        return n_read

    def close(self) -> None:
        if not self.closed:
            self._count(self._size)
        super().close()

    def _count(self, position: int) -> None:
        read_counter.n_bytes += max(0, position - self._counted)
        self._counted = max(self._counted, position)


class _ZstdReader(io.RawIOBase):
    """Decompresses Zstandard frames, one after another. Raises EOFError if the last one is torn."""

    def __init__(self, file: IO[bytes], package: Any) -> None:
        self._file, self._package = file, package
        self._frame: Any = None
        self._input, self._output = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._output:
            self._input = self._input or self._file.read(ZSTD_CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last Zstandard frame is torn")
                return 0
            if self._frame is None:
                self._frame = self._package.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._package.ZstdError as error:
                raise OSError(str(error)) from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        n_bytes = min(len(buffer), len(self._output))
        buffer[:n_bytes] = self._output[:n_bytes]
        self._output = self._output[n_bytes:]
        return n_bytes


def optional_package(name: str, extra: str, purpose: str) -> Any:
    """Imports a module of an optional package. Raises DataError with the command that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{purpose} needs the package {package}: pip install 'reformer_dist[{extra}]'") from error


def uncompressed_name(name: str) -> str:
    """x.tar for x.tar.gz or x.tgz; in lower case, as suffixes are compared."""
    name = name.lower()
    if name.endswith(".tgz"):
        return name.removesuffix(".tgz") + ".tar"
    suffix = next((suffix for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


def decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """The content of an open file, decompressed by the suffix of its name."""
    name = name.lower()
    if name.endswith((".gz", ".tgz")):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))  # implements what is used of IO[bytes]
    if name.endswith(".bz2"):
        return cast(IO[bytes], bz2.BZ2File(file))
    if name.endswith(".xz"):
        return cast(IO[bytes], lzma.LZMAFile(file))
    if name.endswith(".zst"):
        package = optional_package("zstandard", "zstd", f"{name}: a .zst file")
        return cast(IO[bytes], io.BufferedReader(_ZstdReader(file, package), 1 << 20))
    return file


@contextmanager
def open_undecoded(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file of any content as it is. Raises DataError if it can't be read."""
    with naming_errors(path), io.BufferedReader(_CountedFile(path)) as raw:
        yield cast(IO[bytes], raw)


@contextmanager
def open_raw(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file, decompressing .gz, .zst, .xz and .bz2.

    Raises PackedFileError for a format that is not read, and DataError if a file or tar archive can't be.
    """
    with open_undecoded(path) as raw:
        file = decompressed(raw, path.name)
        refuse_packed(peek(file), path.name, str(path))
        yield file


@contextmanager
def naming_errors(where: object) -> Iterator[None]:
    """Raises errors of reading and decompressing as a DataError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"{where}: can't be read ({error}); it is torn or not what its name says") from error


def peek(file: Any, n_bytes: int = MAGIC_BYTES) -> bytes:
    """The first bytes of a file, which are read again."""
    start: bytes = file.peek(n_bytes)
    return start[:n_bytes]


def refuse_packed(start: bytes, name: str, where: str) -> None:
    """Raises PackedFileError if a file of this name and first, decompressed bytes is in a format that is not read.

    A readable format under a name that does not end in its suffix is refused too.
    """
    kind = next((kind for magic, kind in PACKED_FORMATS.items() if start.startswith(magic)), None)
    inner = uncompressed_name(name)
    suffix = Path(inner).suffix
    if kind == "bzip2" and start[4:10] != b"1AY&SY":  # else a text that begins with BZh
        kind = None
    if kind is None and suffix in PACKED_SUFFIXES:
        kind = suffix
    if kind is None or (kind in COLUMN_FORMATS and suffix in READ_AS[kind]):
        return
    if kind in READ_AS and inner != name.lower():
        expected = "it must be compressed once"
    elif kind in READ_AS:
        expected = f"give it a name that ends in {READ_AS[kind][0]}"
    elif kind == "a numpy array" or suffix in (".npy", ".npz"):
        expected = "--ids N reads arrays of token ids"
    else:
        expected = "unpack or convert it to UTF-8 text, .jsonl, .parquet or .gz"
    raise PackedFileError(f"{where}: is {kind}, which can't be read so; {expected}")
