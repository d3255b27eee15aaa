"""Where trials run side by side: each place has GPUs, or CPU threads, of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass

from reformer_dist.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Room for one trial."""

    environment: dict[str, str]


def make_placements(ranks: int | None, parallel: int | None, gpus: list[str], cores: int) -> list[Placement]:
    """Places for trials of `ranks` processes each; None stands for one on each GPU, or one.

    gpus: ids as CUDA_VISIBLE_DEVICES takes them. Raises ConfigError where a trial does not fit.
    """
    if gpus:
        return _on_gpus(ranks or len(gpus), parallel, gpus)
    ranks = ranks or 1
    count = parallel or max(1, cores // ranks)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (count * ranks))))
    return [Placement({"OMP_NUM_THREADS": threads}) for _ in range(count)]


def _on_gpus(ranks: int, parallel: int | None, gpus: list[str]) -> list[Placement]:
    fits = len(gpus) // ranks
    if fits == 0:
        raise ConfigError(f"launcher.nproc_per_node={ranks}: this machine shows {len(gpus)} GPUs to a sweep")
    if parallel is not None and parallel > fits:
        right = f"{len(gpus)} GPUs hold {fits} trials of {ranks} ranks"
        raise ConfigError(f"sweep.parallel={parallel}: {right}")
    shares = [gpus[index * ranks : (index + 1) * ranks] for index in range(parallel or fits)]
    return [Placement({"CUDA_VISIBLE_DEVICES": ",".join(share)}) for share in shares]


def visible_gpus() -> list[str]:
    """Ids of this machine's GPUs, or of those that CUDA_VISIBLE_DEVICES leaves."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [word.strip() for word in listed.split(",") if word.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
