"""Validation of sweep requests, and trials of a grid with invalid combinations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reformer_dist.errors import ConfigError
from reformer_dist.sweep.request import SweepRequest
from reformer_dist.sweep.runner import grid_trials, run_sweep
from reformer_dist.sweep.trials import SweepFile, Trial, TrialStatus

Ask = Callable[..., SweepRequest]
GRID = ("-m", "model.n_hashes=1,2,4", "optim.lr=1e-3,1e-2")


def trials_of(request: SweepRequest) -> list[Trial]:
    request.folder.mkdir(parents=True, exist_ok=True)
    return grid_trials(request, SweepFile(request.folder, request.settings.parse_shard()))


def test_the_error_under_a_launcher_shows_the_right_command(
    requested: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = requested(*GRID)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        run_sweep(request)
    for word in ("torchrun", "reformer-train", *GRID, "launcher=local launcher.nproc_per_node=4"):
        assert word in str(caught.value)
    assert not request.folder.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-m", "optim.lr=1"], "several values"),
        ([*GRID, "resume=never"], "resume=never"),
        ([*GRID, "launcher=local", "launcher.nproc_per_node=3"], "launcher.nproc_per_node=3"),
        ([*GRID, "launcher.nproc_per_node=2"], r"launcher\.nproc_per_node=2: .*launcher=local"),
        (["-m", "model.dimm=1,2"], "model.dimm"),
        (["-m", "optim.lr=a,b"], "optim.lr"),
    ],
)
def test_refusals(requested: Ask, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=told):
        run_sweep(requested(*words))


@pytest.mark.parametrize("name", ["checkpoints", "config.yaml"])
def test_the_folder_of_a_run_is_refused(requested: Ask, name: str) -> None:
    request = requested(*GRID)
    (request.folder / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{request.folder}.*: .*run"):
        run_sweep(request)


def test_invalid_combinations_are_failed_trials(requested: Ask) -> None:
    trials = trials_of(requested("-m", "model.n_heads=2,3,4"))
    assert [trial.state for trial in trials] == [TrialStatus.waiting, TrialStatus.failed, TrialStatus.waiting]
    assert trials[1].reason.startswith("model.n_heads=3: ")


def test_shares_are_all_trials_once(requested: Ask) -> None:
    shares = [
        {trial.name for trial in trials_of(requested(*GRID, f"sweep.shard={index}/4"))} for index in range(4)
    ]
    assert sorted(len(share) for share in shares) == [1, 1, 2, 2]
    assert set.union(*shares) == {trial.name for trial in trials_of(requested(*GRID))}


def finish_all(folder: Path, state: TrialStatus) -> None:
    file = SweepFile(folder, (0, 1))
    for trial in file.trials.values():
        trial.state = state
    file.save()


def test_a_grid_that_grows_keeps_what_is_done(requested: Ask) -> None:
    trials_of(requested(*GRID))
    finish_all(requested(*GRID).folder, TrialStatus.finished)
    request = requested(
        "-m", "model.n_hashes=1,2,8", "optim.lr=choice(1e-3)", "launcher=local", "sweep.parallel=1"
    )
    assert [trial.state.name for trial in trials_of(request)] == ["finished", "finished", "waiting"]
    assert len(SweepFile(request.folder, (0, 1)).trials) == 7


def test_failed_trials_are_retried_on_request(requested: Ask) -> None:
    trials_of(requested(*GRID))
    finish_all(requested(*GRID).folder, TrialStatus.failed)
    assert {trial.state for trial in trials_of(requested(*GRID))} == {TrialStatus.failed}
    assert {trial.state for trial in trials_of(requested(*GRID, "sweep.retry_failed=true"))} == {
        TrialStatus.waiting
    }


def test_other_fixed_keys_need_another_folder(requested: Ask) -> None:
    trials_of(requested(*GRID))
    with pytest.raises(ConfigError, match=r"trainer\.max_steps=7\b.*output_dir"):
        trials_of(requested(*GRID, "trainer.max_steps=7"))
