"""Check of the collectives that training uses, including all-to-all with empty splits.

Run as a module, it is one rank of a job, which fails if it receives a wrong value.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from reformer_dist.distributed import runtime
from reformer_dist.distributed.comm import CommGroup, CommStats, SplitRows
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.doctor.findings import Finding, failed, ok

JOB_TIMEOUT = 60  # seconds
WIDTH = 8
ADVICE = (
    "check which network the ranks use: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME selects the interface, and "
    "NCCL_DEBUG=INFO logs it; in a container, check that ranks can share memory"
)


def check_local_collectives() -> Iterator[Finding]:
    """Runs a job on this machine: one rank per GPU, or two on the CPU."""
    n_ranks = torch.cuda.device_count() if torch.cuda.is_available() else 2
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    command = [sys.executable, *launch, "-m", __name__]
    start = time.perf_counter()
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=JOB_TIMEOUT)
    except subprocess.TimeoutExpired:
        yield failed("collectives", f"{n_ranks} local ranks hang: not done after {JOB_TIMEOUT} s", ADVICE)
        return
    if process.returncode:
        errors = [line for line in process.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
        yield failed("collectives", f"{n_ranks} local ranks: {errors[0] if errors else 'failed'}", ADVICE)
        return
    seconds = time.perf_counter() - start
    yield ok("collectives", f"{n_ranks} local ranks: {process.stdout.strip()} ({seconds:.0f} s)")


def check_collectives(job: Runtime) -> str:
    """Runs all collectives; returns their names. Every rank calls this. Raises RuntimeError for a wrong value."""
    rank, size, device = job.rank, job.world_size, job.device
    ranks = torch.arange(size, dtype=torch.float32, device=device)
    total = torch.full((WIDTH,), float(rank), device=device)
    dist.all_reduce(total)
    _expect("all-reduce", total, ranks.sum().expand(WIDTH))
    gathered = torch.empty(size * WIDTH, device=device)
    dist.all_gather_into_tensor(gathered, torch.full((WIDTH,), float(rank), device=device))
    _expect("all-gather", gathered, ranks.repeat_interleave(WIDTH))
    scattered = torch.empty(WIDTH, device=device)
    dist.reduce_scatter_tensor(scattered, ranks.repeat_interleave(WIDTH).contiguous())
    _expect("reduce-scatter", scattered, torch.full((WIDTH,), float(rank * size), device=device))
    comm = CommGroup(dist.group.WORLD, size, rank, CommStats())
    for shift in range(size):
        _check_exchange(comm, device, shift)
    job.barrier()
    return f"all-reduce, all-gather, reduce-scatter, all-to-all with empty peers over {dist.get_backend()}"


def _check_exchange(comm: CommGroup, device: torch.device, shift: int) -> None:
    """Rank r sends (r + p + shift) % size rows, filled with r, to rank p: to some ranks none."""
    rank, size = comm.index, comm.size
    counts = [(rank + peer + shift) % size for peer in range(size)]
    rows = torch.full((sum(counts), WIDTH), float(rank), device=device)
    received = comm.all_to_all_v(SplitRows(rows, counts, counts), "doctor").wait()
    senders = torch.arange(size, dtype=torch.float32, device=device)
    expected = senders.repeat_interleave(torch.tensor(counts, device=device))
    _expect("all-to-all", received, expected.unsqueeze(1).expand(-1, WIDTH))


def _expect(collective: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(actual, expected):
        raise RuntimeError(f"{collective}: received a wrong value")


if __name__ == "__main__":
    job = runtime.start()
    names = check_collectives(job)
    if job.is_main:
        sys.stdout.write(names + "\n")
    runtime.stop()
