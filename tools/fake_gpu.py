"""A driver for Triton without a GPU: kernels are compiled exactly as they are launched, launches only recorded.

Installed in a process of its own, it lets the launch code run on CPU tensors: strides, alignment, specialized
arguments and launch options are those of a GPU. Outputs stay as they were. The compiled kernels are read back as
machine code: registers, stack, and every instruction.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Bytes of shared memory that a program may have, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"}
LARGEST_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]


LAUNCHES: list[Launch] = []
"""All launches since `install`."""


class _Utils:
    def __init__(self, capability: int) -> None:
        self._capability = capability

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = SHARED_BYTES[self._capability]
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self._name = metadata.name

    def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
        LAUNCHES.append(Launch(self._name, (x, y, z)))


class FakeDriver:
    """The number of the device is its compute capability: Triton keeps compiled kernels apart by device."""

    launcher_cls = _Launcher

    def __init__(self, capability: int) -> None:
        self._capability, self.utils = capability, _Utils(capability)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def install(capability: int = 90) -> None:
    """Replaces Triton's driver. Memory that PyTorch leaves uninitialized is zeros, since no kernel fills it."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET=1: must be unset, since interpreted kernels are not compiled")
    driver.set_active(FakeDriver(capability))
    torch.empty, torch.empty_like = _uncounted(torch.zeros), _uncounted(torch.zeros_like)


def _uncounted(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """create, as an allocation: hidden from `LaunchCounter`."""

    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        with _disable_current_modes():
            return create(*args, **kwargs)

    return allocate


class LaunchCounter(TorchDispatchMode):
    """Counts what a GPU would be given to do: launches of kernels, and PyTorch's operations on memory.

    Views and allocations are not counted. An operation is one launch here, but on a GPU some, such as a sort, are
    several.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.launches: list[str] = []
        """Names of kernels, as soon as the context has ended."""
        self._before = len(LAUNCHES)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.launches += [launch.kernel for launch in LAUNCHES[self._before :]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ALLOCATIONS:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


def compiled_variants(kernel: Any, capability: int = 90) -> list[Any]:
    """The compiled variants of a kernel, oldest first."""
    return list(kernel.device_caches[capability][0].values())


class Instruction(NamedTuple):
    address: int
    opcode: str
    """With its modifiers: LDG.E.128."""
    target: int | None
    """Address that a branch may continue at."""


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel as ptxas left it."""

    registers: int
    """Per thread, as are the bytes of the stack, where spilled registers go."""
    stack_bytes: int
    shared_bytes: int
    """Per program."""
    n_warps: int
    instructions: tuple[Instruction, ...]

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches from its beginning."""
        return sum(bool(re.match(pattern, x.opcode)) for x in self.instructions)

    @property
    def tensor_core_instructions(self) -> int:
        """HMMA (8.0), HGMMA (9.0) and UTCHMMA (10.0), in any precision."""
        return self.count(r"(H|I|D|UTC\w)(G)?MMA")

    @property
    def narrow_loads(self) -> int:
        """Loads of at most 32 bits a thread."""
        return self.count(r"LDG(?!.*\.(64|128))")

    def loops(self) -> list[tuple[int, int]]:
        """Addresses of the first and last instruction of each innermost loop, by address."""
        found = [(x.target, x.address) for x in self.instructions if x.target is not None and x.target < x.address]
        return sorted(
            (a, b) for a, b in found if not any((c, d) != (a, b) and a <= c and d <= b for c, d in found)
        )

    def instructions_of(self, loop: tuple[int, int]) -> int:
        return sum(loop[0] <= x.address <= loop[1] for x in self.instructions)


def machine_code(compiled: Any) -> MachineCode:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [BIN / "cuobjdump", "-res-usage", "-sass", path]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert used is not None, listing[:500]
    instructions = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing):
        words = re.sub(r"^@!?U?P\w+\s+", "", text.strip()).split()
        branch = re.search(r"0x([0-9a-f]+)", text) if words[0].startswith("BRA") else None
        instructions.append(Instruction(int(address, 16), words[0], int(branch[1], 16) if branch else None))
    while instructions and instructions[-1].opcode == "NOP":  # fills the last line of the instruction cache
        instructions.pop()
    return MachineCode(
        int(used[1]), int(used[2]), compiled.metadata.shared, compiled.metadata.num_warps, tuple(instructions)
    )
