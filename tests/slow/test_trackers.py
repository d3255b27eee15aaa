"""Trackers in their offline modes, for real: a run that is killed three times leaves every scalar in them once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.tiny import tiny_overrides

from reformer_dist.training.mlflow_tracker import DATABASE
from reformer_dist.training.tracker import TRACKER_FILE

pytestmark = [pytest.mark.slow, pytest.mark.jobs]

Scalars = Counter[tuple[int, str, float]]
LAST = 24
KILLED_AT = (4, 12, 17)
# wandb writes every 15 seconds otherwise, which no step of the test would see
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.05"}


def start(run: Path, data: Path, tracker: str, kill_at: int | None) -> None:
    """Trains up to the end, or until the line of a step is printed, at which the process is killed."""
    changed = (f"trainer.max_steps={LAST}", "trainer.save_every=5", "trainer.eval_every=6", "data.eval_rows=2")
    words = tiny_overrides(data, run, *changed, f"tracker.kind={tracker}", "tracker.offline=true")
    command = [sys.executable, "-u", "-m", "reformer_dist.train", *words]
    output = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if kill_at is not None and f"{kill_at}/{LAST} | loss" in line:
                process.send_signal(signal.SIGKILL)
        status = process.wait(300)
    assert status == (0 if kill_at is None else -signal.SIGKILL), "".join(output)


def of_metrics_file(run: Path) -> Scalars:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Counter(
        (row["step"], tag, value)
        for row in rows
        for tag, value in row.items()
        if tag != "step" and value is not None
    )


def of_wandb(run: Path) -> Scalars:
    from reformer_dist.training.wandb_tracker import history

    found: Scalars = Counter()
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        for step, values in history(path):
            numbers = {tag: json.loads(value) for tag, value in values.items() if not tag.startswith("_")}
            found.update((step, tag, value) for tag, value in numbers.items() if isinstance(value, float | int))
    return found


def of_mlflow(run: Path) -> Scalars:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / DATABASE}")
    run_id = json.loads((run / TRACKER_FILE).read_text())["run_id"]
    tags = client.get_run(run_id).data.metrics
    return Counter((each.step, tag, each.value) for tag in tags for each in client.get_metric_history(run_id, tag))


@pytest.mark.parametrize(("tracker", "read"), [("wandb", of_wandb), ("mlflow", of_mlflow)])
def test_every_scalar_is_stored_once_after_three_kills(
    tracker: str, read: object, tiny_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip(tracker, reason=f"pip install 'reformer_dist[{tracker}]'")
    run = tmp_path / "run"
    run_ids = set()
    for kill_at in (*KILLED_AT, None):
        start(run, tiny_data, tracker, kill_at)
        run_ids.add(json.loads((run / TRACKER_FILE).read_text())["run_id"])
    assert len(run_ids) == 1
    assert callable(read)
    expected, found = of_metrics_file(run), read(run)
    assert {step for step, _, _ in expected} == set(range(1, LAST + 1))
    assert max(found.values()) == 1
    assert {(step, tag) for step, tag, _ in found} == {(step, tag) for step, tag, _ in expected}
    # a replayed step takes another time, of which the tracker keeps the first
    timed = ("time_s", "perf/")
    assert {each for each in found if not each[1].startswith(timed)} == {
        each for each in expected if not each[1].startswith(timed)
    }
