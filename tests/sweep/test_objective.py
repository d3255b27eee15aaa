"""The objective of a sweep: its direction, its name, a change of it, and its spread over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sweep_helpers import write_metrics

from reformer_dist.config import SweepConfig
from reformer_dist.config.sweep import METRICS
from reformer_dist.errors import ConfigError
from reformer_dist.sweep.report import best_first, over_seeds
from reformer_dist.sweep.request import SweepRequest
from reformer_dist.sweep.runner import run_sweep
from reformer_dist.sweep.search import OptunaSearch
from reformer_dist.sweep.trials import SweepFile, Trial, TrialStatus

Ask = Callable[..., SweepRequest]
ACCURACY = [
    "task.kind=sequence_classification",
    "model.causal=false",
    "model.qk_conv=0",
    "trainer.sample_every=0",
    "sweep.objective=eval/accuracy",
]
GRID = ["--multirun", "optim.lr=1,2"]


def finished(name: str, value: float | None, tag: str = "eval/accuracy", **changed: str) -> Trial:
    result = {} if value is None else {tag: value}
    return Trial(name, changed, TrialStatus.finished, result=result)


@pytest.mark.parametrize(("tag", "higher"), METRICS.items())
def test_directions(tag: str, higher: bool) -> None:
    settings = SweepConfig(objective=tag, coverage_rows=1, task_rows=1)
    assert settings.maximizes is higher
    trials = [finished("low", 0.1, tag), finished("none", None, tag), finished("high", 0.9, tag)]
    names = [trial.name for trial in best_first(trials, tag, maximize=settings.maximizes)]
    assert names == (["high", "low", "none"] if higher else ["low", "high", "none"])
    assert SweepConfig(objective=tag, direction="minimize", coverage_rows=1, task_rows=1).maximizes is False  # type: ignore[arg-type]
    assert SweepConfig(objective=tag, direction="maximize", coverage_rows=1, task_rows=1).maximizes is True  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["sweep.objective=eval/acuracy"], "eval/accuracy"),
        (["sweep.objective=loss"], "eval/loss"),
        (["sweep.objective=''"], "eval/loss"),
        (["sweep.direction=up"], "maximize"),
        (["sweep.objective=coverage/mass"], "sweep.coverage_rows"),
        (["sweep.objective=task/f1"], "sweep.task_rows"),
        (["sweep.objective=eval/accuracy"], "task.kind=language_model"),
        (["sweep.objective=task/bleu", "sweep.task_rows=1"], "task.kind=language_model"),
        (["sweep.objective=eval/bits_per_byte", *ACCURACY[:4]], "task.kind=sequence_classification"),
    ],
)
def test_objectives_that_no_trial_reports(words: list[str], part: str, requested: Ask) -> None:
    with pytest.raises(ConfigError) as caught:
        run_sweep(requested(*GRID, *words))
    assert str(caught.value).startswith("sweep.")
    assert part in str(caught.value)


@pytest.fixture
def classifier(requested: Ask) -> SweepRequest:
    """A grid of two trials that have run: the first by loss is the second by accuracy."""
    request = requested(*GRID, *ACCURACY)
    from reformer_dist.sweep.runner import grid_trials

    request.folder.mkdir()
    file = SweepFile(request.folder, (0, 1))
    for trial, loss, accuracy in zip(grid_trials(request, file), (0.1, 0.2), (0.6, 0.7), strict=True):
        write_metrics(request.folder / trial.name, {"step": 1, "eval/loss": loss, "eval/accuracy": accuracy})
        trial.state, trial.result = TrialStatus.finished, {"eval/loss": loss}
    file.save()
    return request


def test_results_are_read_again(classifier: SweepRequest, requested: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials recorded losses only; the best follows the objective of the command."""
    monkeypatch.setattr(SweepFile, "lock", lambda file: 0)  # it lasts as long as the process
    for words, best in ((ACCURACY, "optim.lr-2"), (ACCURACY[:4], "optim.lr-1")):
        assert run_sweep(requested(*GRID, *words)) == 0
        rows = json.loads((classifier.folder / "results.json").read_text())
        assert rows[0]["trial"] == best
        assert {row["eval/accuracy"] for row in rows} == {0.6, 0.7}


def test_optuna_follows_the_direction(requested: Ask, tmp_path: Path) -> None:
    pytest.importorskip("optuna")

    def search(*words: str) -> OptunaSearch:
        request = requested("sweep=optuna", "optim.lr=interval(0.1,1)", *ACCURACY[:4], *words)
        request.folder.mkdir(exist_ok=True)
        make = lambda name, changed: Trial(name, changed)  # noqa: E731
        return OptunaSearch(request, SweepFile(request.folder, (0, 1)), make)

    assert search(ACCURACY[4])._study.direction.name == "MAXIMIZE"
    for words in ([], ["sweep.objective=train/loss"], [ACCURACY[4], "sweep.direction=minimize"]):
        with pytest.raises(ConfigError, match=r"output_dir=.*study with (objective|direction)"):
            search(*words)


def test_seeds() -> None:
    trials = [
        *(
            finished(f"a{s}", v, "eval/loss", **{"optim.lr": "1", "trainer.seed": str(s)})
            for s, v in ((0, 1.0), (1, 3.0))
        ),
        finished("b", 5.0, "eval/loss", **{"optim.lr": "2", "trainer.seed": "0"}),
        finished("c", 5.0, "eval/loss", **{"optim.lr": "3"}),
    ]
    (row,) = over_seeds(trials, "eval/loss")
    assert row == {"optim.lr": "1", "seeds": 2, "mean eval/loss": 2.0, "deviation": pytest.approx(2**0.5)}
