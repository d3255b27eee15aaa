"""Placement of concurrent trials: each has its own GPUs or CPU threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

from reformer_dist.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Resources of one trial, as environment variables."""

    environment: dict[str, str]


def make_placements(ranks: int | None, parallel: int | None, gpus: list[str], cores: int) -> list[Placement]:
    """Placements for trials of `ranks` processes each; None: one per GPU, or one on a CPU.

    gpus: ids in the format of CUDA_VISIBLE_DEVICES. Raises ConfigError if a trial does not fit.
    """
    if gpus:
        return _on_gpus(ranks or len(gpus), parallel, gpus)
    ranks = ranks or 1
    count = parallel or max(1, cores // ranks)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (count * ranks))))
    return [Placement({"OMP_NUM_THREADS": threads}) for _ in range(count)]


def _on_gpus(ranks: int, parallel: int | None, gpus: list[str]) -> list[Placement]:
    capacity = len(gpus) // ranks
    if capacity == 0:
        raise ConfigError(
            f"launcher.nproc_per_node={ranks}: exceeds the {len(gpus)} visible GPUs; use at most that many"
        )
    if parallel is not None and parallel > capacity:
        fix = f"{len(gpus)} GPUs fit {capacity} trials of {ranks} ranks"
        raise ConfigError(f"sweep.parallel={parallel}: {fix}")
    groups = [gpus[index * ranks : (index + 1) * ranks] for index in range(parallel or capacity)]
    return [Placement({"CUDA_VISIBLE_DEVICES": ",".join(group)}) for group in groups]


def visible_gpus() -> list[str]:
    """GPU ids of this machine, restricted by CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
