"""A sweep from its request to its report: checks, trials, driver, table."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import sys

from reformer_dist.config import LauncherKind, RunConfig, SweepKind
from reformer_dist.distributed import runtime
from reformer_dist.errors import ConfigError
from reformer_dist.process.log import logger
from reformer_dist.run.compose import compose_run, plain
from reformer_dist.sweep.driver import Command, Driver, SearchStrategy
from reformer_dist.sweep.grid import GridSearch, combinations, trial_name
from reformer_dist.sweep.metrics import COVERAGE, read_coverage, read_metrics, summarise
from reformer_dist.sweep.placement import make_placements, usable_cores, visible_gpus
from reformer_dist.sweep.report import best_first, write_report
from reformer_dist.sweep.request import SweepRequest, as_override, without
from reformer_dist.sweep.state import TrialStatus, SweepFile, Trial, read_all

INTERRUPTED, PREEMPTED = 130, 75
# groups and keys that change neither the numbers of a trial nor its folder
FREE = ("launcher", "sweep", "output_dir", "resume")


def run_sweep(request: SweepRequest) -> int:
    """Runs what is still to run, and reports; returns the status to end with.

    0: every trial has a result; 1: some failed; 75 or 130: stopped by SIGTERM or SIGINT, to go on by the same
    command. Raises ConfigError.
    """
    _check(request)
    settings, launcher = request.settings, request.launcher
    ranks = launcher.nproc_per_node if launcher.kind is LauncherKind.local else 1
    places = make_placements(ranks, settings.parallel, visible_gpus(), usable_cores())
    request.folder.mkdir(parents=True, exist_ok=True)
    file = SweepFile(request.folder, settings.share())
    file.lock()
    plan = _plan(request, file)
    logger.info(f"sweep in {request.folder}: {plan.describe()}, {len(places)} side by side")
    driver = Driver(file, places, _commands(request), lambda trial: _take_result(request, trial))
    cut_by = driver.run(plan)
    write_report(request.folder, list(read_all(request.folder).values()), settings.objective)
    if cut_by is not None:
        logger.info("the sweep was stopped; the same command goes on with it")
        return INTERRUPTED if cut_by == signal.SIGINT else PREEMPTED
    _announce_best(request)
    return int(any(trial.state is TrialStatus.failed for trial in file.trials.values()))


def _check(request: SweepRequest) -> None:
    folder, words = request.folder, shlex.join(sys.argv[1:])
    if runtime.is_rank():
        n_ranks = runtime.ranks_per_node()
        ours = f"reformer-train {words} launcher=local launcher.nproc_per_node={n_ranks}"
        raise ConfigError(f"a sweep starts the ranks of its trials itself; without torchrun or deepspeed: {ours}")
    request.launcher.require_read()
    if not request.space:
        example = "such as model.n_hashes=2,4 or optim.lr=1e-3,3e-4"
        raise ConfigError(f"--multirun: no key has several values to try; give some, {example}")
    for word in request.fixed:
        if word.lstrip("+").startswith("resume=") and word != "resume=auto":
            raise ConfigError(f"{word}: the trials of a sweep go on from their own checkpoints; leave it out")
    if (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
        raise ConfigError(f"output_dir={folder}: holds a run; a sweep needs a folder of its own, choose another")


def _plan(request: SweepRequest, file: SweepFile) -> SearchStrategy:
    if request.settings.kind is SweepKind.optuna:
        from reformer_dist.sweep.search import OptunaSearch

        return OptunaSearch(request, file, lambda name, changed: make_trial(request, name, changed))
    return GridSearch(grid_trials(request, file))


def grid_trials(request: SweepRequest, file: SweepFile) -> list[Trial]:
    """This driver's share of the combinations, with what is known of each; those that can't run have failed.

    Raises ConfigError where none of them can run, or where one has run with other fixed keys.
    """
    index, count = request.settings.share()
    known, trials, errors = read_all(request.folder), [], []
    for changed in combinations(request.space)[index::count]:
        name = trial_name(changed)
        trial = known.get(name, Trial(name, changed))
        try:
            described = make_trial(request, name, changed)
        except ConfigError as error:
            trial.state, trial.reason = TrialStatus.failed, str(error)
            errors.append(error)
        else:
            _require_same(request, trial, described)
            trial.overrides, trial.digest = described.overrides, described.digest
            if trial.state is TrialStatus.failed and request.settings.retry_failed:
                trial.state = TrialStatus.waiting
        trials.append(trial)
    if errors and len(errors) == len(trials):
        raise errors[0]
    file.trials |= {trial.name: trial for trial in trials}
    file.save()
    return trials


def make_trial(request: SweepRequest, name: str, changed: dict[str, str]) -> Trial:
    """A new trial. Raises ConfigError where its configuration can't run."""
    overrides = [*without(request.fixed, "output_dir"), *(f"{key}={value}" for key, value in changed.items())]
    return Trial(name, changed, overrides=overrides, digest=_digest(compose_run(overrides)))


def _digest(config: RunConfig) -> str:
    told = {key: value for key, value in plain(config).items() if key not in FREE}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _require_same(request: SweepRequest, trial: Trial, described: Trial) -> None:
    if trial.digest in ("", described.digest):
        return
    before, now = set(trial.overrides), set(described.overrides)
    differing = shlex.join(sorted(before - now)) or "other defaults"
    raise ConfigError(
        f"output_dir={request.folder}: {trial.name} ran there with {differing} instead of "
        f"{shlex.join(sorted(now - before)) or 'those of now'}; choose another output_dir"
    )


def _commands(request: SweepRequest) -> list[Command]:
    def train(trial: Trial) -> list[str]:
        return ["-m", "reformer_dist.train", *_words(request, trial)]

    def measure(trial: Trial) -> list[str]:
        folder, rows = request.folder / trial.name, str(request.settings.coverage_rows)
        return [
            "-m",
            "reformer_dist.evaluate",
            str(folder),
            "--coverage",
            "--rows",
            rows,
            "--output",
            str(folder / COVERAGE),
        ]

    return [train, measure] if request.settings.coverage_rows else [train]


def _words(request: SweepRequest, trial: Trial) -> list[str]:
    """A trial's command line."""
    return [*trial.overrides, as_override("output_dir", str(request.folder / trial.name))]


def _announce_best(request: SweepRequest) -> None:
    """Names the best trial, and the command that trains it on, from where it ended to twice its steps."""
    objective = request.settings.objective
    finished = [trial for trial in read_all(request.folder).values() if trial.state is TrialStatus.finished]
    best = next(iter(best_first(finished, objective)), None)
    if best is None or objective not in best.result:
        return
    steps = compose_run(best.overrides).trainer.max_steps * 2
    changed = " ".join(f"{key}={value}" for key, value in best.changed.items())
    logger.info(f"\nbest: {best.name}, {objective} {best.result[objective]:.4f}, with {changed}")
    words = [*_words(request, best), f"trainer.max_steps={steps}"]
    logger.info(f"train it on, in its own folder:\nreformer-train {shlex.join(words)}")


def _take_result(request: SweepRequest, trial: Trial) -> None:
    folder = request.folder / trial.name
    trial.result = summarise(read_metrics(folder), request.settings.objective) | read_coverage(folder)
