"""A driver for Triton without a GPU: kernels are compiled exactly as they are launched, launches only recorded.

Installed in a process of its own, it lets the launch code run on CPU tensors: strides, alignment, specialized
arguments and launch options are those of a GPU. Outputs stay as they were.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CAPABILITY = 90
SHARED_BYTES = 227 * 1024  # available to a program of compute capability 9.0
LARGEST_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]


LAUNCHES: list[Launch] = []
"""All launches since `install`."""


class _Utils:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self._name = metadata.name

    def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
        LAUNCHES.append(Launch(self._name, (x, y, z)))


class FakeDriver:
    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def install() -> None:
    """Replaces Triton's driver. Memory that PyTorch leaves uninitialized is zeros, since no kernel fills it."""
    driver.set_active(FakeDriver())
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like


def compiled_variants(kernel: Any) -> list[Any]:
    """The compiled variants of a kernel, oldest first."""
    return list(kernel.device_caches[0][0].values())


def resources(compiled: Any) -> dict[str, int]:
    """Registers per thread, bytes spilled per thread, and bytes of shared memory per program."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        limit = compiled.metadata.maxnreg
        command = [PTXAS, "-v", f"--gpu-name=sm_{CAPABILITY}a", path, "-o", path.with_suffix(".cubin")]
        command += [] if limit is None else [f"--maxrregcount={limit}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        int(re.search(rf"(\d+) {words}", said)[1]) for words in ("registers", "bytes spill loads")
    )
    return {"registers": registers, "spilled_bytes": spilled, "shared_bytes": compiled.metadata.shared}
