"""Trains the runs of a plan one after another, as one rank of a job.

two_ranks.py PLAN OUT     PLAN: JSON {name: overrides}; OUT: JSON {name: what each rank raised, or null}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from reformer_dist.config import RunConfig
from reformer_dist.distributed import runtime
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import UserError
from reformer_dist.run.build import build_trainer
from reformer_dist.run.compose import run_config_from, to_dict


def train(job: Runtime, overrides: list[str]) -> None:
    with ExitStack() as resources:
        build_trainer(run_config_from(to_dict(RunConfig()), overrides), job, resources).fit()


def outcome(job: Runtime, action: Callable[[], Any]) -> list[str | None]:
    """Error of each rank, or None."""
    error: str | None = None
    try:
        action()
    except UserError as caught:
        error = f"{type(caught).__name__}: {caught}"
    return job.gather(error)


def fail(message: str) -> None:
    raise UserError(message)


def agreements(job: Runtime) -> dict[str, Any]:
    """Results of Runtime's reductions and shared errors."""
    last = job.rank == job.world_size - 1
    return {
        "none fails": outcome(job, lambda: job.together(lambda: None)),
        "the last fails": outcome(job, lambda: job.together(lambda: fail("disk full") if last else None)),
        "all fail alike": outcome(job, lambda: job.together(lambda: fail("no data"))),
        "all fail apart": outcome(job, lambda: job.together(lambda: fail(f"odd {job.rank}"))),
        "main fails": outcome(job, lambda: job.on_main(lambda: fail("main only"))),
        "main tells": job.gather(job.on_main(lambda: f"from {job.rank}")),
        "raise nothing": outcome(job, lambda: job.raise_together(None)),
        "sum": job.sum([job.rank + 1, 0.5, 2.0**53]),
        "gather": job.gather({"rank": job.rank}),
    }


def main(plan: Path, out: Path) -> None:
    torch.set_num_threads(1)
    job = runtime.start()
    found: dict[str, Any] = {"agreements": agreements(job)}
    for name, overrides in json.loads(plan.read_text()).items():
        found[name] = outcome(job, lambda overrides=overrides: train(job, overrides))
    if job.is_main:
        out.write_text(json.dumps(found))
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
