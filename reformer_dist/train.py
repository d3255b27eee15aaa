"""reformer-train: trains a model, also under torchrun or deepspeed. `reformer-train key=value ...`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from reformer_dist.config import LauncherKind, RunConfig
from reformer_dist.config.stages import check_ranks
from reformer_dist.errors import ConfigError
from reformer_dist.process.live_line import live
from reformer_dist.process.signals import exit_on_signal, terminate_with_launcher

if TYPE_CHECKING:
    from reformer_dist.sweep.request import SweepRequest

DRY_RUN, PLOT, VOCAB_SIZE = "--dry-run", "--plot", "--vocab-size"
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


def _given(option: str) -> list[str]:
    """Arguments that set an option of this command, which Hydra does not know."""
    return [argument for argument in sys.argv[1:] if argument.split("=")[0] == option]


def _run() -> None:
    from reformer_dist.sweep.request import run_or_sweep

    flags, plots, sizes = (_given(option) for option in (DRY_RUN, PLOT, VOCAB_SIZE))
    if plots and not flags:
        raise ConfigError(f"{plots[-1]}: needs {DRY_RUN}, whose schedule it draws")
    if sizes and not flags:
        raise ConfigError(f"{sizes[-1]}: needs {DRY_RUN}; a run has the vocabulary of its dataset")
    if not flags:
        run_or_sweep(train, sweep)
        return
    sys.argv = [argument for argument in sys.argv if argument not in (*flags, *plots, *sizes)]  # unknown to Hydra
    path = plots[-1].partition("=")[2] if plots else None
    if path == "":
        raise ConfigError(f"{plots[-1]}: must name a file, such as {PLOT}=schedule.png")

    def plan(config: RunConfig) -> None:
        from reformer_dist.run.dry_run import dry_run, read_vocab_size

        vocab_size = read_vocab_size(sizes[-1]) if sizes else None
        dry_run(config, flags[-1], Path(path) if path else None, vocab_size)

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
