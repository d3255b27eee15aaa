"""reformer-train: trains a model, also under torchrun or deepspeed. `reformer-train key=value ...`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

from reformer_dist.config import LauncherKind, RunConfig
from reformer_dist.config.stages import check_ranks
from reformer_dist.errors import ConfigError
from reformer_dist.process.live_line import live
from reformer_dist.process.signals import exit_on_signal, terminate_with_launcher
from reformer_dist.process.version import version_line

if TYPE_CHECKING:
    from reformer_dist.sweep.request import SweepRequest

ADVICE = "run the same command again to resume from the last checkpoint"


def train(config: RunConfig) -> None:
    """Trains as one rank of the job, or launches its ranks. Raises UserError on every rank."""
    from reformer_dist.distributed import environment

    if not environment.is_rank():
        config.launcher.refuse_unused_keys()
        if config.launcher.kind is not LauncherKind.none:
            _launch(config, sys.argv[1:])
            return
    # before the imports of torch and DeepSpeed, for which --help and an invalid override need not wait
    check_ranks(config, environment.env_world_size())
    with live.shown():
        _train_as_rank(config)


def _train_as_rank(config: RunConfig) -> None:
    with live.phase("importing"):
        from reformer_dist.distributed import failures, runtime
        from reformer_dist.run import out_of_memory
        from reformer_dist.run.build import build_trainer
        from reformer_dist.training.preemption import StopSignal

    stop = StopSignal()
    with stop.listen():
        timeout, traces = timedelta(seconds=config.parallel.timeout), f"{config.output_dir}/nccl_rank_"
        job = runtime.start(timeout, trace_prefix=traces)
        stop.defer_to_steps()
        with ExitStack() as resources, failures.detect_lost_ranks(job, ADVICE):
            try:
                with out_of_memory.reported(config, job):
                    build_trainer(config, job, resources, stop).fit()
            except runtime.Preempted:
                stop.exit_soon()
                raise


def _launch(config: RunConfig, arguments: list[str]) -> None:
    """Starts the ranks on this machine, or prints the job file of the configured launcher."""
    if config.launcher.kind is LauncherKind.local:
        if config.launcher.nproc_per_node is not None:
            check_ranks(config, config.launcher.nproc_per_node)
        from reformer_dist.launch.local import run_ranks

        sys.exit(run_ranks("reformer_dist.train", arguments, config.launcher, ADVICE))
    from reformer_dist.launch.render import render

    sys.stdout.write(render(config, arguments))


def sweep(request: SweepRequest) -> None:
    """Runs the trials of a sweep as separate jobs, or prints the script that does.

    Raises ConfigError; exits with the status of the trials.
    """
    from reformer_dist.distributed import environment

    if request.launcher.kind not in (LauncherKind.none, LauncherKind.local) and not environment.is_rank():
        from reformer_dist.launch.render import render_sweep

        sys.stdout.write(render_sweep(request.launcher, sys.argv[1:]))
        return
    from reformer_dist.sweep.runner import run_sweep

    sys.exit(run_sweep(request))


def _run() -> None:
    from reformer_dist.run.options import DRY_RUN, take_options
    from reformer_dist.sweep.request import run_or_sweep

    options = take_options(sys.argv[1:])
    sys.argv[1:] = options.rest
    if options.version:
        sys.stdout.write(version_line("reformer-train"))
        return
    if options.explain is not None:
        from reformer_dist.run.explain import explain

        sys.stdout.write(explain(options.explain, options.rest))
        return
    flag = options.dry_run
    if flag is None:
        run_or_sweep(train, sweep)
        return

    def plan(config: RunConfig) -> None:
        from reformer_dist.run.dry_run import dry_run

        dry_run(config, flag, options.plot, options.vocab_size)

    def refuse(request: SweepRequest) -> None:
        raise ConfigError(
            f"{DRY_RUN}: describes one run, but this command line is a sweep; give each key one value"
        )

    run_or_sweep(plan, refuse)


def main() -> None:
    # before any slow import
    exit_on_signal()
    terminate_with_launcher()
    from reformer_dist.process.command import run_command

    run_command(_run)


if __name__ == "__main__":
    main()
