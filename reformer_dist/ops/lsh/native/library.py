"""The C sources in this directory as a shared library: compiled on first use and cached in the user's home.

A failure is a reason to use another backend, never an error: the library only adds speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

from reformer_dist.ops.spinning import warn_of_spinning

HERE = Path(__file__).parent
SOURCES = ("attention.c", "hash.c", "order.c")
HEADERS = ("vectors.h",)
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-Wno-psabi", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("gcc", "cc")
TIMEOUT = 120  # seconds
DIGEST = hashlib.sha256().digest_size


class Unavailable(Exception):
    """The reason why the library is not available."""


@functools.cache
def unavailable_reason() -> str | None:
    """Reason why the library is not available on this machine, or None if it is."""
    try:
        library()
    except Unavailable as reason:
        return str(reason)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled unless cached. Raises Unavailable.

    It uses the OpenMP runtime that PyTorch has loaded and shares its threads.
    """
    if platform.system() != "Linux":
        raise Unavailable(f"needs Linux, not {platform.system()}; torch takes any system")
    warn_of_spinning()
    cached = cache_directory() / f"attention-{_fingerprint()}.so"
    if _is_intact(cached):
        return _load(cached)
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory) / cached.name
        _compile(built)
        loaded = _load(built)
        _store(built, cached)
    return loaded


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled library can't be loaded: {error}") from None


def cache_directory() -> Path:
    """Directory of compiled libraries: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "reformer_dist"


def _fingerprint() -> str:
    """Hash of the sources, flags and CPU features: a home directory may be shared by different machines."""
    digest = hashlib.sha256("\0".join((*FLAGS, platform.machine(), _cpu_features())).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    """Instruction set extensions, as listed by Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _compiler() -> str:
    names = [name for name in (os.environ.get("CC"), *COMPILERS) if name]
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        raise Unavailable("needs a C compiler (gcc); torch needs none")
    return compiler


def _compile(target: Path) -> None:
    compiler = _compiler()
    command = [compiler, *FLAGS, *(str(HERE / name) for name in SOURCES), "-o", str(target), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler} could not be run: {error}") from None
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        raise Unavailable(f"{compiler} could not compile it: {reason.strip()}")


def _store(built: Path, cached: Path) -> None:
    """Caches the library with a digest appended. Safe for concurrent processes; skipped if it can't be written."""
    code = built.read_bytes()
    with contextlib.suppress(OSError), contextlib.ExitStack() as cleanup:
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_name(f".{cached.name}.{uuid.uuid4().hex}.partial")
        cleanup.callback(partial.unlink, missing_ok=True)
        partial.write_bytes(code + hashlib.sha256(code).digest())
        partial.replace(cached)


def _is_intact(cached: Path) -> bool:
    """Whether the file exists as `_store` wrote it: loading a truncated library crashes the process."""
    try:
        code = cached.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(code[:-DIGEST]).digest() == code[-DIGEST:]
