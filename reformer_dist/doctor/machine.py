"""Software, devices and limits of this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from reformer_dist.doctor.findings import Finding, failed, ok, warning
from reformer_dist.ops.lsh.native.library import why_unavailable
from reformer_dist.process.cores import usable_cores

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED = 1 * GIB
ENOUGH_DISK = 10 * GIB
ENOUGH_FILES = 4096
SLOW_SYNC = 0.5  # seconds for SYNC_BYTES
SYNC_BYTES = 16 * 2**20
OPTIONAL = ("triton", "tokenizers", "optuna")


def versions() -> Iterator[Finding]:
    """Of Python and of every package that reformer_dist requires, held against what it requires."""
    yield ok("python", f"{platform.python_version()} on {platform.platform()}")
    for words in importlib.metadata.requires("reformer_dist") or []:
        requirement = Requirement(words)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)
    for name in OPTIONAL:
        found = _version(name)
        yield ok(name, found or "not installed; not needed by training")


def _package(requirement: Requirement) -> Finding:
    found, fix = _version(requirement.name), f"pip install '{requirement}'"
    if found is None:
        return failed(requirement.name, "not installed", fix)
    if not requirement.specifier.contains(found, prereleases=True):
        return failed(requirement.name, f"{found}, but {requirement.specifier} is required", fix)
    return ok(requirement.name, found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    yield ok("cores", f"{usable_cores()} for this process, PyTorch uses {torch.get_num_threads()}")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            advice = "install the PyTorch build for this driver's CUDA: https://pytorch.org/get-started"
            yield warning("GPUs", f"nvidia-smi is there, but PyTorch {torch.__version__} sees none", advice)
        else:
            yield ok("GPUs", "none; runs use the CPU")
        return
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        capability = f"{known.major}.{known.minor}"
        yield ok(
            f"GPU {index}", f"{known.name}, {known.total_memory / GIB:.1f} GiB, compute capability {capability}"
        )
    yield ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def compilers() -> Iterator[Finding]:
    """Triton calls one for its kernels' launchers; on a CPU it makes attention's library."""
    name = next(
        (name for name in (os.environ.get("CC"), "gcc", "cc", "clang") if name and shutil.which(name)), None
    )
    if name is not None:
        yield ok("C compiler", shutil.which(name) or name)
    elif torch.cuda.is_available():
        yield failed("C compiler", "none", "install gcc, which Triton needs on a GPU")
    else:
        yield ok("C compiler", "none")


def native_attention() -> Iterator[Finding]:
    """Whether a CPU attends by the C library."""
    reason = why_unavailable()
    words = "by the C library" if reason is None else f"by plain PyTorch: the C library {reason}"
    if reason is None or torch.cuda.is_available():
        yield ok("attention on the CPU", words)
    else:
        yield warning(
            "attention on the CPU", words, "install gcc: LSH attention takes several times as long without"
        )


def shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """NCCL's ranks on one machine meet there."""
    if not folder.is_dir():
        yield ok("shared memory", f"no {folder} on this system")
        return
    total = shutil.disk_usage(folder).total
    words = f"{total / GIB:.2f} GiB in {folder}"
    if total < ENOUGH_SHARED:
        yield warning("shared memory", words, "give the container more: docker run --shm-size=8g, or --ipc=host")
    else:
        yield ok("shared memory", words)


def file_limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < ENOUGH_FILES:
        most = "as many as you like" if hard == resource.RLIM_INFINITY else hard
        advice = f"ulimit -n {ENOUGH_FILES} before starting (allowed here: {most})"
        yield warning("open files", f"at most {soft}", advice)
    else:
        yield ok("open files", f"at most {'unlimited' if soft == resource.RLIM_INFINITY else soft}")


def disk(folder: Path) -> Iterator[Finding]:
    """Where runs are written: room, and how long a checkpoint's fsync takes."""
    fix = "choose another folder for output_dir and give it: --output PATH"
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    words = f"{free / GIB:.1f} GiB free in {existing}"
    if free < SYNC_BYTES:
        yield failed("disk", words, fix)
        return
    yield ok("disk", words) if free >= ENOUGH_DISK else warning("disk", words, f"make room, or {fix}")
    try:
        seconds = _time_sync(existing)
    except OSError as error:
        yield failed("disk speed", f"{existing} can't be written to: {error.strerror or error}", fix)
        return
    words = f"{SYNC_BYTES / 2**20 / seconds:,.0f} MiB/s with fsync"
    slow = "checkpoints will take long: raise trainer.save_every, or choose a faster disk for output_dir"
    yield ok("disk speed", words) if seconds < SLOW_SYNC else warning("disk speed", words, slow)


def _time_sync(folder: Path) -> float:
    block = os.urandom(SYNC_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - start
