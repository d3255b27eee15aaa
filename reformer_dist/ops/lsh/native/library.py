"""The C sources beside this file as a library of this machine: compiled once, then kept in the user's cache.

Any failure is a reason to attend otherwise, never an error: nothing here is needed for anything but speed.
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
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("attention.c", "hash.c", "order.c")
HEADERS = ("vectors.h",)
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-Wno-psabi", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("gcc", "cc")
TIMEOUT = 120  # seconds
DIGEST = hashlib.sha256().digest_size


class Unavailable(Exception):
    """The reason for which there is no library here."""


@functools.cache
def why_unavailable() -> str | None:
    """Why there is no library on this machine; None where there is one."""
    try:
        library()
    except Unavailable as reason:
        return str(reason)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled if that was not done before. Raises Unavailable.

    It finds the OpenMP that PyTorch has loaded, whose threads it shares.
    """
    if platform.system() != "Linux":
        raise Unavailable(f"needs Linux, not {platform.system()}; torch takes any system")
    kept = cache_folder() / f"attention-{_fingerprint()}.so"
    if _is_whole(kept):
        return _load(kept)
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / kept.name
        _compile(built)
        found = _load(built)
        _keep(built, kept)
    return found


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"what was compiled can't be loaded: {error}") from None


def cache_folder() -> Path:
    """Where compiled libraries are kept: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "reformer_dist"


def _fingerprint() -> str:
    """Of the sources, and of the processor that they are compiled for: one home may serve many machines."""
    digest = hashlib.sha256("\0".join((*FLAGS, platform.machine(), _processor())).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What instructions it has, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _compiler() -> str:
    names = [name for name in (os.environ.get("CC"), *COMPILERS) if name]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable("needs a C compiler (gcc); torch needs none")
    return found


def _compile(target: Path) -> None:
    compiler = _compiler()
    command = [compiler, *FLAGS, *(str(HERE / name) for name in SOURCES), "-o", str(target), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler} could not be run: {error}") from None
    if done.returncode != 0:
        words = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        raise Unavailable(f"{compiler} could not compile it: {words.strip()}")


def _keep(built: Path, kept: Path) -> None:
    """For the next process, with a digest at its end; several may do so at once, and some homes take no files."""
    code = built.read_bytes()
    with contextlib.suppress(OSError), contextlib.ExitStack() as at_end:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            at_end.callback(Path(file.name).unlink, missing_ok=True)
            file.write(code + hashlib.sha256(code).digest())
        Path(file.name).replace(kept)


def _is_whole(kept: Path) -> bool:
    """Whether it is there as `_keep` wrote it: to load part of a library ends the process."""
    try:
        code = kept.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(code[:-DIGEST]).digest() == code[-DIGEST:]
