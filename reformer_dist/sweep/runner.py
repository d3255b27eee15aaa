"""Runs a sweep from its request to its report: validation, trials, driver, results."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import sys

from reformer_dist.config import LauncherKind, RunConfig, SweepKind, TaskKind
from reformer_dist.config.checks import require
from reformer_dist.config.optim import OPEN_ENDED
from reformer_dist.distributed import environment
from reformer_dist.errors import ConfigError
from reformer_dist.process.cores import usable_cores
from reformer_dist.process.exit_status import INTERRUPTED, PREEMPTED
from reformer_dist.process.log import logger
from reformer_dist.run.compose import compose_run, to_dict
from reformer_dist.sweep.driver import Command, Driver, SearchStrategy
from reformer_dist.sweep.grid import GridSearch, combinations, trial_name
from reformer_dist.sweep.placement import make_placements, visible_gpus
from reformer_dist.sweep.report import best_first, write_report
from reformer_dist.sweep.request import SweepRequest, as_override, drop_key
from reformer_dist.sweep.trial_metrics import COVERAGE, TASK, read_evaluations, read_metrics, summarize
from reformer_dist.sweep.trials import ENDED, SweepFile, Trial, TrialStatus, read_all

# tasks that do not report a metric
WITH_TEXT = (TaskKind.language_model, TaskKind.completion)
ONLY_MEASURED = {
    "eval/bits_per_byte": WITH_TEXT,
    "train/bits_per_byte": WITH_TEXT,
    **dict.fromkeys(
        ("task/bleu", "task/rouge_1", "task/rouge_2", "task/rouge_l"), (TaskKind.sequence_to_sequence,)
    ),
    **dict.fromkeys(("task/exact_match", "task/f1"), (TaskKind.question_answering,)),
}
NOT_MEASURED = {
    "eval/accuracy": (TaskKind.language_model,),
    **{tag: tuple(kind for kind in TaskKind if kind not in kinds) for tag, kinds in ONLY_MEASURED.items()},
}
# groups and keys that do not affect the results of a trial
EXCLUDED_FROM_DIGEST = ("launcher", "sweep", "output_dir", "resume")


def run_sweep(request: SweepRequest) -> int:
    """Runs the remaining trials and writes the report; returns the exit status.

    0: every trial has a result; 1: some failed; 75 or 130: stopped by SIGTERM or SIGINT, to be resumed with the
    same command. Raises ConfigError.
    """
    _validate(request)
    settings, launcher = request.settings, request.launcher
    ranks = launcher.nproc_per_node if launcher.kind is LauncherKind.local else 1
    placements = make_placements(ranks, settings.parallel, visible_gpus(), usable_cores())
    request.folder.mkdir(parents=True, exist_ok=True)
    file = SweepFile(request.folder, settings.parse_shard())
    file.lock()
    strategy: SearchStrategy
    if settings.kind is SweepKind.optuna:
        from reformer_dist.sweep.search import OptunaSearch

        strategy = OptunaSearch(request, file, lambda name, changed: make_trial(request, name, changed))
    else:
        strategy = GridSearch(grid_trials(request, file))
    logger.info(f"sweep in {request.folder}: {strategy.describe()}, {len(placements)} at a time")

    def collect_result(trial: Trial) -> None:
        trial.result = _read_result(request, trial)

    stop_signal = Driver(file, placements, _commands(request), collect_result).run(strategy)
    write_report(request.folder, _all_trials(request), settings.objective, maximize=settings.maximizes)
    if stop_signal is not None:
        logger.info("sweep stopped; run the same command again to resume")
        return INTERRUPTED if stop_signal == signal.SIGINT else PREEMPTED
    _log_best(request)
    return int(any(trial.state is TrialStatus.failed for trial in file.trials.values()))


def _read_result(request: SweepRequest, trial: Trial) -> dict[str, float]:
    folder = request.folder / trial.name
    return summarize(read_metrics(folder), request.settings.objective) | read_evaluations(folder)


def _all_trials(request: SweepRequest) -> list[Trial]:
    """Trials of all drivers. Results are read again, since those in the files may be of another objective."""
    trials = list(read_all(request.folder).values())
    for trial in trials:
        if trial.state in ENDED:
            trial.result |= _read_result(request, trial)
    return trials


def _validate(request: SweepRequest) -> None:
    folder, arguments = request.folder, shlex.join(sys.argv[1:])
    if environment.is_rank():
        n_ranks = environment.ranks_per_node()
        command = f"reformer-train {arguments} launcher=local launcher.nproc_per_node={n_ranks}"
        reason = "a sweep launches the ranks of its trials"
        raise ConfigError(f"{reason}; run it without torchrun or deepspeed: {command}")
    request.launcher.refuse_unused_keys()
    if not request.space:
        example = "such as model.n_hashes=2,4 or optim.lr=1e-3,3e-4"
        raise ConfigError(f"--multirun: no key has several values; give some, {example}")
    for word in request.fixed:
        if word.lstrip("+").startswith("resume=") and word != "resume=auto":
            raise ConfigError(f"{word}: trials resume from their own checkpoints; leave it out")
    if (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
        raise ConfigError(f"output_dir={folder}: contains a run; choose another folder for the sweep")


def grid_trials(request: SweepRequest, file: SweepFile) -> list[Trial]:
    """This driver's shard of the combinations with their recorded status; invalid ones are marked failed.

    Raises ConfigError if all are invalid, or if one has run with other fixed keys.
    """
    index, count = request.settings.parse_shard()
    known, trials, errors = read_all(request.folder), [], []
    for changed in combinations(request.space)[index::count]:
        name = trial_name(changed)
        trial = known.get(name, Trial(name, changed))
        try:
            new = make_trial(request, name, changed)
        except ConfigError as error:
            trial.state, trial.reason = TrialStatus.failed, str(error)
            errors.append(error)
        else:
            _require_same_config(request, trial, new)
            trial.overrides, trial.digest = new.overrides, new.digest
            if trial.state is TrialStatus.failed and request.settings.retry_failed:
                trial.state = TrialStatus.waiting
        trials.append(trial)
    if errors and len(errors) == len(trials):
        raise errors[0]
    file.trials |= {trial.name: trial for trial in trials}
    file.save()
    return trials


def make_trial(request: SweepRequest, name: str, changed: dict[str, str]) -> Trial:
    """A new trial. Raises ConfigError if its configuration is invalid."""
    overrides = [*drop_key(request.fixed, "output_dir"), *(f"{key}={value}" for key, value in changed.items())]
    config = compose_run(overrides, request.files)
    kinds = NOT_MEASURED.get(request.settings.objective, ())
    requirement = f"task.kind={config.task.kind.name} does not report it"
    require(config.task.kind not in kinds, "sweep.objective", request.settings.objective, requirement)
    return Trial(name, changed, overrides=overrides, digest=_config_digest(config))


def _config_digest(config: RunConfig) -> str:
    values = {key: value for key, value in to_dict(config).items() if key not in EXCLUDED_FROM_DIGEST}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _require_same_config(request: SweepRequest, trial: Trial, new: Trial) -> None:
    if trial.digest in ("", new.digest):
        return
    before, now = set(trial.overrides), set(new.overrides)
    raise ConfigError(
        f"output_dir={request.folder}: {trial.name} ran there with "
        f"{shlex.join(sorted(before - now)) or 'other defaults'} instead of "
        f"{shlex.join(sorted(now - before)) or 'the current ones'}; choose another output_dir"
    )


def _commands(request: SweepRequest) -> list[Command]:
    def train(trial: Trial) -> list[str]:
        return ["-m", "reformer_dist.train", *trial_arguments(request, trial)]

    def evaluation(rows: int, output: str, *options: str) -> Command:
        def evaluate(trial: Trial) -> list[str]:
            folder = request.folder / trial.name
            arguments = [str(folder), *options, f"--rows={rows}", f"--output={folder / output}"]
            return ["-m", "reformer_dist.evaluate", *arguments]

        return evaluate

    commands: list[Command] = [train]
    if request.settings.coverage_rows:
        commands.append(evaluation(request.settings.coverage_rows, COVERAGE, "--coverage"))
    if request.settings.task_rows:
        commands.append(evaluation(request.settings.task_rows, TASK))
    return commands


def trial_arguments(request: SweepRequest, trial: Trial) -> list[str]:
    """Command line of a trial."""
    return [
        *request.files.arguments(),
        *trial.overrides,
        as_override("output_dir", str(request.folder / trial.name)),
    ]


def _log_best(request: SweepRequest) -> None:
    """Logs the best trial and the command that resumes its training, for twice the steps."""
    objective = request.settings.objective
    finished = [trial for trial in _all_trials(request) if trial.state is TrialStatus.finished]
    best = next(iter(best_first(finished, objective, maximize=request.settings.maximizes)), None)
    if best is None or objective not in best.result:
        return
    changed = " ".join(f"{key}={value}" for key, value in best.changed.items())
    logger.info(f"\nbest: {best.name}, {objective} {best.result[objective]:.4f}, {changed}")
    config = compose_run(best.overrides, request.files)
    if config.optim.decay_from is not None:
        return  # its rate has decayed: what to train further is a checkpoint from before that
    steps, optim = config.trainer.max_steps, config.optim
    longer = [f"trainer.max_steps={steps * 2}"]
    if optim.schedule not in OPEN_ENDED:
        restarts = ",".join(map(str, [*optim.restarts, steps]))
        longer.append(f"optim.restarts=[{restarts}]")
    arguments = [*trial_arguments(request, best), *longer]
    logger.info(f"to continue its training:\nreformer-train {shlex.join(arguments)}")
