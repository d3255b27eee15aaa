"""Placement of concurrent trials: each has its own GPUs or CPU threads."""

from __future__ import annotations

import os

from reformer_dist.errors import ConfigError

Placement = dict[str, str]  # resources of one trial, as environment variables of its processes


def make_placements(ranks: int | None, parallel: int | None, gpus: list[str], cores: int) -> list[Placement]:
    """Placements for trials of `ranks` processes each; None: one per GPU, or one on a CPU.

    gpus: ids in the format of CUDA_VISIBLE_DEVICES. Raises ConfigError if a trial does not fit.
    """
    if gpus:
        ranks = ranks or len(gpus)
        capacity = len(gpus) // ranks
        if capacity == 0:
            problem = f"exceeds the {len(gpus)} visible GPUs; use at most that many"
            raise ConfigError(f"launcher.nproc_per_node={ranks}: {problem}")
        if parallel is not None and parallel > capacity:
            problem = f"{len(gpus)} GPUs fit {capacity} trials of {ranks} ranks"
            raise ConfigError(f"sweep.parallel={parallel}: {problem}")
        groups = [gpus[index * ranks : (index + 1) * ranks] for index in range(parallel or capacity)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]
    ranks = ranks or 1
    count = parallel or max(1, cores // ranks)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (count * ranks))))
    return [{"OMP_NUM_THREADS": threads} for _ in range(count)]


def visible_gpus() -> list[str]:
    """GPU ids of this machine, restricted by CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
