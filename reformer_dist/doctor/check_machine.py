"""Checks of the software, devices and limits of this machine."""

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
from reformer_dist.ops.lsh.native.library import unavailable_reason
from reformer_dist.process.cores import usable_cores
from reformer_dist.process.version import package_version

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED = 1 * GIB
ENOUGH_DISK = 10 * GIB
ENOUGH_FILES = 4096
SLOW_SYNC = 0.5  # seconds for SYNC_BYTES
SYNC_BYTES = 16 * 2**20
OPTIONAL = ("triton", "tokenizers", "optuna")


def check_versions() -> Iterator[Finding]:
    """Python, and all packages that reformer_dist requires with their version."""
    yield ok("python", f"{platform.python_version()} on {platform.platform()}")
    for line in importlib.metadata.requires("reformer_dist") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version, fix = package_version(requirement.name), f"pip install '{requirement}'"
        if version is None:
            yield failed(requirement.name, "not installed", fix)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield failed(requirement.name, f"{version}, but {requirement.specifier} is required", fix)
        else:
            yield ok(requirement.name, version)
    for name in OPTIONAL:
        yield ok(name, package_version(name) or "not installed; not needed by training")


def check_devices() -> Iterator[Finding]:
    yield ok("cores", f"{usable_cores()} for this process, PyTorch uses {torch.get_num_threads()}")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            advice = "install the PyTorch build for this driver's CUDA: https://pytorch.org/get-started"
            yield warning("GPUs", f"nvidia-smi is installed, but PyTorch {torch.__version__} finds no GPU", advice)
        else:
            yield ok("GPUs", "none; runs use the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory, capability = f"{properties.total_memory / GIB:.1f} GiB", f"{properties.major}.{properties.minor}"
        yield ok(f"GPU {index}", f"{properties.name}, {memory}, compute capability {capability}")
    yield ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def check_compiler() -> Iterator[Finding]:
    """Triton compiles kernel launchers with it; on a CPU it compiles the native attention."""
    paths = [shutil.which(name) for name in (os.environ.get("CC"), "gcc", "cc", "clang") if name]
    path = next(filter(None, paths), None)
    if path is not None:
        yield ok("C compiler", path)
    elif torch.cuda.is_available():
        yield failed("C compiler", "none", "install gcc, which Triton needs on a GPU")
    else:
        yield ok("C compiler", "none")


def check_native_backend() -> Iterator[Finding]:
    """Whether the native backend is available."""
    reason = unavailable_reason()
    message = "native backend" if reason is None else f"torch backend: the native one {reason}"
    if reason is None or torch.cuda.is_available():
        yield ok("attention on the CPU", message)
    else:
        advice = "install gcc: LSH attention is several times slower without it"
        yield warning("attention on the CPU", message, advice)


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """NCCL uses it between the ranks of a machine."""
    if not folder.is_dir():
        yield ok("shared memory", f"no {folder} on this system")
        return
    total = shutil.disk_usage(folder).total
    message = f"{total / GIB:.2f} GiB in {folder}"
    if total < ENOUGH_SHARED:
        yield warning("shared memory", message, "increase it: docker run --shm-size=8g, or --ipc=host")
    else:
        yield ok("shared memory", message)


def check_open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < ENOUGH_FILES:
        hard_limit = "unlimited" if hard == resource.RLIM_INFINITY else hard
        advice = f"ulimit -n {ENOUGH_FILES} before starting (hard limit: {hard_limit})"
        yield warning("open files", f"at most {soft}", advice)
    else:
        yield ok("open files", f"at most {'unlimited' if soft == resource.RLIM_INFINITY else soft}")


def check_disk(folder: Path) -> Iterator[Finding]:
    """Free space and fsync speed where runs are written."""
    fix = "choose another directory for output_dir and check it with --output PATH"
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    message = f"{free / GIB:.1f} GiB free in {existing}"
    if free < SYNC_BYTES:
        yield failed("disk", message, fix)
        return
    yield ok("disk", message) if free >= ENOUGH_DISK else warning("disk", message, f"free some space, or {fix}")
    try:
        seconds = _time_sync(existing)
    except OSError as error:
        yield failed("disk speed", f"{existing} can't be written to: {error.strerror or error}", fix)
        return
    message = f"{SYNC_BYTES / 2**20 / seconds:,.0f} MiB/s with fsync"
    advice = "checkpoints will be slow: raise trainer.save_every, or choose a faster disk for output_dir"
    yield ok("disk speed", message) if seconds < SLOW_SYNC else warning("disk speed", message, advice)


def _time_sync(folder: Path) -> float:
    block = os.urandom(SYNC_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - start
