"""Whether ranks reach one another: every collective that training uses, all-to-all with empty messages included.

Run as a module it is one rank of a job, which fails if anything that arrives is wrong.
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

LONGEST = 60  # seconds that a local job may take
WIDTH = 8
ADVICE = (
    "see which network the ranks use: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names the interface, and "
    "NCCL_DEBUG=INFO tells more; in a container, see that ranks may share memory"
)


def local_collectives() -> Iterator[Finding]:
    """Starts a job on this machine, a rank for each GPU and at least two on a CPU."""
    n_ranks = torch.cuda.device_count() if torch.cuda.is_available() else 2
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    command = [sys.executable, *launch, "-m", __name__]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        yield failed("collectives", f"{n_ranks} local ranks hang: no answer in {LONGEST} s", ADVICE)
        return
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
        yield failed("collectives", f"{n_ranks} local ranks: {said[0] if said else 'failed'}", ADVICE)
        return
    yield ok("collectives", f"{n_ranks} local ranks: {done.stdout.strip()} ({time.perf_counter() - start:.0f} s)")


def job_collectives(job: Runtime) -> Iterator[Finding]:
    """Of the job that this process is a rank of; every rank calls this."""
    yield ok("collectives", f"{job.world_size} ranks of this job: {check_collectives(job)}")


def check_collectives(job: Runtime) -> str:
    """Runs them all; says which. Raises RuntimeError where something else arrives than was sent."""
    rank, size, device = job.rank, job.world_size, job.device
    ranks = torch.arange(size, dtype=torch.float32, device=device)
    total = torch.full((WIDTH,), float(rank), device=device)
    dist.all_reduce(total)
    _expect("all-reduce", total, ranks.sum().expand(WIDTH))
    gathered = torch.empty(size * WIDTH, device=device)
    dist.all_gather_into_tensor(gathered, torch.full((WIDTH,), float(rank), device=device))
    _expect("all-gather", gathered, ranks.repeat_interleave(WIDTH))
    share = torch.empty(WIDTH, device=device)
    dist.reduce_scatter_tensor(share, ranks.repeat_interleave(WIDTH).contiguous())
    _expect("reduce-scatter", share, torch.full((WIDTH,), float(rank * size), device=device))
    comm = CommGroup(dist.group.WORLD, size, rank, CommStats())
    for shift in range(size):
        _check_exchange(comm, device, shift)
    job.barrier()
    return f"all-reduce, all-gather, reduce-scatter, all-to-all with empty peers over {dist.get_backend()}"


def _check_exchange(comm: CommGroup, device: torch.device, shift: int) -> None:
    """Rank r sends (r + p + shift) % size rows to rank p, each with its number; none to some."""
    rank, size = comm.index, comm.size
    counts = [(rank + peer + shift) % size for peer in range(size)]
    rows = torch.full((sum(counts), WIDTH), float(rank), device=device)
    received = comm.all_to_all_v(SplitRows(rows, counts, counts), "doctor").wait()
    senders = torch.arange(size, dtype=torch.float32, device=device)
    right = senders.repeat_interleave(torch.tensor(counts, device=device))
    _expect("all-to-all", received, right.unsqueeze(1).expand(-1, WIDTH))


def _expect(what: str, found: torch.Tensor, right: torch.Tensor) -> None:
    if not torch.equal(found, right):
        raise RuntimeError(f"{what}: something else arrives than was sent")


if __name__ == "__main__":
    this = runtime.start()
    words = check_collectives(this)
    if this.is_main:
        sys.stdout.write(words + "\n")
    runtime.stop()
