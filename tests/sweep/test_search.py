"""Optuna search without a driver: proposals, pruning, restarts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from reformer_dist.errors import ConfigError
from reformer_dist.sweep.request import SweepRequest
from reformer_dist.sweep.runner import make_trial
from reformer_dist.sweep.trials import SweepFile, Trial, TrialStatus

pytest.importorskip("optuna")
Ask = Callable[..., SweepRequest]
RATES, WINDOWS = "optim.lr=tag(log,interval(1e-4,1e-1))", "model.window=range(16,65,16)"
SPACE = ("sweep=optuna", RATES, "model.n_hashes=1,2,4", WINDOWS)


def open_strategy(request: SweepRequest):  # type: ignore[no-untyped-def]
    """Creates the strategy as a new driver does."""
    from reformer_dist.sweep.search import OptunaSearch

    request.folder.mkdir(parents=True, exist_ok=True)
    file = SweepFile(request.folder, request.settings.parse_shard())
    return OptunaSearch(request, file, lambda name, changed: make_trial(request, name, changed)), file


def finish(strategy, file: SweepFile, trial: Trial, loss: float) -> None:  # type: ignore[no-untyped-def]
    trial.state, trial.result = TrialStatus.finished, {"eval/loss": loss}
    file.save()
    strategy.trial_ended(trial)


def states(folder: Path) -> list[str]:
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    return [trial.state.name for trial in study.trials]


def test_a_study_ends_after_its_trials_and_grows_on(requested: Ask) -> None:
    strategy, file = open_strategy(requested(*SPACE, "sweep.n_trials=3"))
    for number in range(3):
        trial = strategy.next_trial()
        assert trial.name == f"trial-000{number}"
        assert trial.changed["model.n_hashes"] in ("1", "2", "4")
        assert trial.changed["model.window"] in ("16", "32", "48", "64")
        assert 1e-4 <= float(trial.changed["optim.lr"]) <= 1e-1
        assert f"optim.lr={trial.changed['optim.lr']}" in trial.overrides
        finish(strategy, file, trial, number)
    assert strategy.next_trial() is None
    strategy, _ = open_strategy(requested(*SPACE, "sweep.n_trials=4"))
    assert strategy.next_trial().name == "trial-0003" and strategy.next_trial() is None


def test_a_new_driver_resumes_the_trials_of_the_last(requested: Ask) -> None:
    """One was running, one had ended without being reported to the study, one was only proposed."""
    request = requested(*SPACE, "sweep.n_trials=4")
    strategy, file = open_strategy(request)
    done, unreported, running, proposed = (strategy.next_trial() for _ in range(4))
    finish(strategy, file, done, 1.0)
    unreported.state, unreported.result = TrialStatus.finished, {"eval/loss": 2.0}
    running.state = TrialStatus.running
    file.save()
    del file.trials[proposed.name]
    file.save()
    strategy, file = open_strategy(request)
    assert states(request.folder) == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    left = [strategy.next_trial(), strategy.next_trial()]
    assert [trial.name for trial in left] == ["trial-0002", "trial-0003"]
    assert [trial.changed for trial in left] == [running.changed, proposed.changed]
    assert strategy.next_trial() is None


def test_a_trial_that_was_only_half_proposed_is_proposed_whole(requested: Ask) -> None:
    request = requested(*SPACE, "sweep.n_trials=1")
    strategy, _ = open_strategy(request)
    strategy._study.ask().suggest_categorical("model.n_hashes", ("1", "2", "4"))
    strategy, _ = open_strategy(request)
    trial = strategy.next_trial()
    assert trial.name == "trial-0000" and len(trial.changed) == 3 and strategy.next_trial() is None
    half = strategy._study.trials[0].params["model.n_hashes"]
    assert trial.changed["model.n_hashes"] == half


def test_a_new_driver_does_not_propose_the_same_points_again(requested: Ask) -> None:
    request = requested(*SPACE, "sweep.n_trials=6")
    seen = set()
    for _ in range(6):
        strategy, file = open_strategy(request)
        trial = strategy.next_trial()
        seen.add(tuple(trial.changed.values()))
        finish(strategy, file, trial, 1.0)
    assert len(seen) == 6


def test_the_same_seed_proposes_the_same_points(requested: Ask) -> None:
    def points(folder: str, seed: int) -> list[dict[str, str]]:
        request = requested(*SPACE, f"sweep.seed={seed}")
        strategy, _ = open_strategy(replace(request, folder=request.folder / folder))
        return [strategy.next_trial().changed for _ in range(3)]

    assert points("a", 1) == points("b", 1) != points("c", 2)


def test_a_trial_below_the_median_is_pruned(requested: Ask) -> None:
    strategy, file = open_strategy(requested(*SPACE, "sweep.prune_after=3"))
    for number in range(4):
        trial = strategy.next_trial()
        assert not strategy.should_prune(trial, [{"step": 2, "eval/loss": 9.0 + number}])
        assert not strategy.should_prune(trial, [{"step": 4, "eval/loss": 1.0 + number / 10}])
        finish(strategy, file, trial, 1.0)
    bad, good = strategy.next_trial(), strategy.next_trial()
    assert not strategy.should_prune(bad, [{"step": 2, "eval/loss": 99.0}])
    assert strategy.should_prune(bad, [{"step": 2, "eval/loss": 99.0}, {"step": 4, "eval/loss": 5.0}])
    assert not strategy.should_prune(good, [{"step": 4, "eval/loss": 0.5}])
    bad.state = TrialStatus.pruned
    strategy.trial_ended(bad)
    assert states(file.folder)[4:] == ["PRUNED", "RUNNING"]


def test_pruning_can_be_disabled(requested: Ask) -> None:
    strategy, file = open_strategy(requested(*SPACE, "sweep.prune_after=null"))
    for _ in range(4):
        finish(strategy, file, strategy.next_trial(), 1.0)
    assert not strategy.should_prune(strategy.next_trial(), [{"step": 4, "eval/loss": 5.0}])


def test_failures_count_and_are_retried_on_request(requested: Ask) -> None:
    request = requested(*SPACE, "sweep.n_trials=2")
    strategy, file = open_strategy(request)
    killed, silent = strategy.next_trial(), strategy.next_trial()
    killed.state, killed.reason = TrialStatus.failed, "killed by SIGKILL"
    file.save()
    strategy.trial_ended(killed)
    silent.state = TrialStatus.finished  # without any value
    strategy.trial_ended(silent)
    assert silent.state is TrialStatus.failed and "no eval/loss" in silent.reason
    assert states(request.folder) == ["FAIL", "FAIL"] and strategy.next_trial() is None
    again = requested(*SPACE, "sweep.n_trials=2", "sweep.retry_failed=true")
    strategy, file = open_strategy(again)
    retried = [strategy.next_trial(), strategy.next_trial()]
    assert [trial.changed for trial in retried] == [killed.changed, silent.changed]
    assert strategy.next_trial() is None
    for trial in retried:
        finish(strategy, file, trial, 1.0)
    strategy, _ = open_strategy(again)
    assert strategy.next_trial() is None


def test_an_invalid_point_fails_and_the_next_is_proposed(requested: Ask) -> None:
    strategy, file = open_strategy(
        requested("sweep=optuna", "model.n_heads=3,5,7,4", "sweep.n_trials=8", "sweep.seed=3")
    )
    running = []
    while (trial := strategy.next_trial()) is not None:
        running.append(trial)
    failed = [trial for trial in file.trials.values() if trial.state is TrialStatus.failed]
    assert len(running) + len(failed) == 8 and failed and running
    assert all("model.n_heads" in trial.reason for trial in failed)
    assert {trial.changed["model.n_heads"] for trial in running} == {"4"}


@pytest.mark.parametrize("changed", ["trainer.max_steps=7", "model.n_hashes=1,2"])
def test_another_study_needs_another_folder(requested: Ask, changed: str) -> None:
    open_strategy(requested(*SPACE))
    with pytest.raises(ConfigError, match="output_dir"):
        open_strategy(requested(*SPACE, changed))


def test_shards_share_one_study_but_not_their_trials(requested: Ask) -> None:
    first, file = open_strategy(requested(*SPACE, "sweep.n_trials=3", "sweep.shard=0/2"))
    trial = first.next_trial()
    trial.state = TrialStatus.running
    file.save()
    second, _ = open_strategy(requested(*SPACE, "sweep.n_trials=3", "sweep.shard=1/2"))
    names = [trial.name, second.next_trial().name, first.next_trial().name]
    assert names == ["trial-0000", "trial-0001", "trial-0002"]
    assert first.next_trial() is None and second.next_trial() is None


def test_the_error_without_optuna_says_what_to_install(requested: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'reformer_dist\[sweep\]'"):
        open_strategy(requested(*SPACE))
