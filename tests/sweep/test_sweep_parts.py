"""Status on disk, locks, placements, metrics, errors in logs, tables and plots."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
from sweep_helpers import write_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from reformer_dist.errors import ConfigError, UserError
from reformer_dist.fs.lock import acquire_lock
from reformer_dist.sweep.placement import make_placements, visible_gpus
from reformer_dist.sweep.plots import pareto_front, write_plots
from reformer_dist.sweep.process import find_error
from reformer_dist.sweep.report import as_text, best_first, table, write_report
from reformer_dist.sweep.trial_metrics import read_metrics, summarize
from reformer_dist.sweep.trials import SweepFile, Trial, TrialStatus, read_all
from reformer_dist.training.metrics_log import METRICS_FILE

GOOD = Trial(
    "a", {"optim.lr": "0.1"}, TrialStatus.finished, result={"eval/loss": 1.5, "perf/tokens_per_s": 2000.0}
)
SLOW = Trial(
    "b", {"optim.lr": "0.2"}, TrialStatus.finished, result={"eval/loss": 1.25, "perf/tokens_per_s": 1000.0}
)
PRUNED = Trial("c", {"optim.lr": "9"}, TrialStatus.pruned, reason="at step 2", result={"eval/loss": 0.5})
FAILED = Trial("d", {"model.position": "rotary"}, TrialStatus.failed, reason="no memory")
ALL = [FAILED, PRUNED, GOOD, SLOW]


def test_state_round_trip(tmp_path: Path) -> None:
    file = SweepFile(tmp_path, (0, 1))
    file.trials = {trial.name: trial for trial in ALL}
    file.save()
    assert SweepFile(tmp_path, (0, 1)).trials == file.trials
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_the_later_status_of_two_files_wins(tmp_path: Path) -> None:
    for shard, state in enumerate((TrialStatus.running, TrialStatus.finished, TrialStatus.interrupted)):
        file = SweepFile(tmp_path, (shard, 3))
        file.trials = {"a": Trial("a", {}, state)}
        file.save()
    assert read_all(tmp_path)["a"].state is TrialStatus.finished


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 0, "trials": {}}', '{"format": 1, "trials": {"a": {}}}']
)
def test_an_invalid_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match=r"sweep\.json"):
        read_all(tmp_path)


def test_a_second_driver_is_refused_by_name(tmp_path: Path) -> None:
    held = SweepFile(tmp_path, (0, 1)).lock()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        SweepFile(tmp_path, (0, 1)).lock()
    SweepFile(tmp_path, (1, 2)).lock()  # another shard
    os.close(held)
    SweepFile(tmp_path, (0, 1)).lock()


def test_an_inherited_lock_is_held(tmp_path: Path) -> None:
    lock = acquire_lock(tmp_path / "lock")
    assert lock is not None
    inherited = os.dup(lock)
    os.close(lock)
    assert acquire_lock(tmp_path / "lock") is None
    os.close(inherited)
    assert acquire_lock(tmp_path / "lock") is not None


PLACEMENTS = [
    # ranks, parallel, GPUs, cores, expected environments
    (1, None, "", 2, [{"OMP_NUM_THREADS": "1"}] * 2),
    (2, None, "", 8, [{"OMP_NUM_THREADS": "1"}] * 4),
    (2, 1, "", 8, [{"OMP_NUM_THREADS": "4"}]),
    (4, None, "", 2, [{"OMP_NUM_THREADS": "1"}]),
    (1, 3, "", 2, [{"OMP_NUM_THREADS": "1"}] * 3),
    (1, None, "0,1", 8, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
    (2, None, "0,1,2,3,4", 8, [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]),
    (2, 1, "GPU-a,GPU-b,GPU-c,GPU-d", 8, [{"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}]),
    (None, None, "0,1", 8, [{"CUDA_VISIBLE_DEVICES": "0,1"}]),
]


@pytest.mark.parametrize(("ranks", "parallel", "gpus", "cores", "given"), PLACEMENTS)
def test_placements(
    monkeypatch: pytest.MonkeyPatch,
    ranks: int | None,
    parallel: int | None,
    gpus: str,
    cores: int,
    given: list[dict[str, str]],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert make_placements(ranks, parallel, visible_gpus(), cores) == given


@pytest.mark.parametrize(("ranks", "parallel", "key"), [(3, None, "launcher.nproc"), (2, 2, "sweep.parallel=2")])
def test_trials_that_do_not_fit(ranks: int, parallel: int | None, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_placements(ranks, parallel, ["0", "1"], 8)


def test_metrics_of_a_resumed_run(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "train/loss": 3.0, "perf/tokens_per_s": 10.0},
        {"step": 2, "train/loss": 2.0, "perf/tokens_per_s": 30.0},
        {"step": 2, "eval/loss": 2.5},
        {"step": 1, "train/loss": 3.5},
        {"step": 2, "train/loss": 2.25},
        {"step": 3, "train/loss": None, "perf/tokens_per_s": 20.0},
    ]
    write_metrics(tmp_path, *rows)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('null\n"x"\n{"step": 4, "train/lo')
    read = read_metrics(tmp_path)
    assert [row["step"] for row in read] == [1, 2, 3]
    assert summarize(read, "eval/loss") == {
        "step": 3,
        "eval/loss": 2.5,
        "train/loss": 2.25,
        "perf/tokens_per_s": 20.0,
    }
    assert read_metrics(tmp_path / "nothing") == [] and summarize([], "eval/loss") == {}


LOGS = [
    (["step 1", "error: model.x=3: wrong", "Traceback", "RuntimeError: later"], "model.x=3: wrong"),
    (["Traceback", "  File", "torch.OutOfMemoryError: CUDA out of memory", ""], "torch.OutOfMemoryError: CUDA"),
    (["step 1", "step 2", " "], "step 2"),
    ([], ""),
]


@pytest.mark.parametrize(("lines", "words"), LOGS)
def test_error_of_a_log(lines: list[str], words: str) -> None:
    assert find_error(lines).startswith(words)


def test_the_table_names_every_trial_best_first() -> None:
    rows = table(best_first(ALL, "eval/loss"), "eval/loss")
    assert [row["trial"] for row in rows] == ["b", "a", "c", "d"]
    lines = as_text(rows).splitlines()
    assert lines[0].split() == ["state", "optim.lr", "model.position", "eval/loss", "perf/tokens_per_s", "reason"]
    assert lines[1].split() == ["finished", "0.2", "-", "1.25", "1,000"]
    assert lines[4].split() == ["failed", "-", "rotary", "-", "-", "no", "memory"]


def test_pareto() -> None:
    points = {
        "slow": (1.0, 1.0),
        "fast": (3.0, 2.0),
        "worse": (2.0, 2.5),
        "same": (1.0, 1.0),
        "middle": (2.0, 1.5),
    }
    front = pareto_front(points)
    assert front[:2] == ["fast", "middle"] and front[2] in ("slow", "same") and len(front) == 3


def test_a_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for trial in (GOOD, SLOW):
        rows = [{"step": step, "time_s": 60.0 * step, "eval/loss": 3.0 / step} for step in (1, 2)]
        write_metrics(tmp_path / trial.name, *rows)
    for _ in range(2):  # the second report replaces the first
        write_report(tmp_path, ALL, "eval/loss")
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["trial"] for row in rows] == ["b", "a", "c", "d"]
    read = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [row["eval/loss"] for row in read] == ["1.25", "1.5", "0.5", ""]
    for name in ("loss_over_time.png", "pareto_tokens_per_s.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "hparams").iterdir()) == ["a", "b", "c"]
    events = EventAccumulator(str(tmp_path / "hparams/b"))
    events.Reload()
    assert events.Scalars("result/eval/loss")[0].value == 1.25
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["optim.lr"].number_value == 0.2


def test_the_error_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'reformer_dist\[sweep\]'"):
        write_plots(tmp_path, ALL, "eval/loss")
    write_report(tmp_path, ALL, "eval/loss")
    assert (tmp_path / "results.csv").is_file()
