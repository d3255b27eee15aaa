"""Entry: train a model. `reformer-train experiment=... key=value ...`, or under torchrun or deepspeed."""

from __future__ import annotations

from contextlib import ExitStack

from reformer_dist.cli import run_command
from reformer_dist.compose import hydra_entry
from reformer_dist.config import RunConfig


def train(config: RunConfig) -> None:
    """Trains as one rank of the job. Raises UserError, alike on every rank."""
    # loads torch and DeepSpeed, which --help and a bad override need not wait for
    from reformer_dist.build import build_trainer
    from reformer_dist.distributed import runtime

    with ExitStack() as resources:
        build_trainer(config, runtime.start(), resources).fit()


def main() -> None:
    run_command(lambda: hydra_entry(train))


if __name__ == "__main__":
    main()
