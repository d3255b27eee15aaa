"""Sweeps of real jobs: failures are reported, interrupted trials resume, and finished ones do not rerun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.launch import BIN, run_command, run_ranks
from support.tiny import tiny_overrides, write_tiny_dataset

from reformer_dist.data import ByteTokenizer, RawSample, write_samples

pytestmark = [pytest.mark.slow, pytest.mark.jobs]
BOUND = 600  # seconds, of a busy machine
KILLED_TRIAL = "data.batch_size-12"
Start = Callable[[list[str]], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts drivers, which are killed at the end together with their trials."""
    drivers: list[subprocess.Popen[bytes]] = []

    def driver(words: list[str]) -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as file:
            command = [str(BIN / "reformer-train"), *words]
            drivers.append(
                subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=hear_interrupts)
            )
        return drivers[-1]

    yield driver
    for each in drivers:
        each.kill()
        each.wait()


def hear_interrupts() -> None:
    """Restores SIGINT, which background jobs of a shell and their children ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline and driver.poll() is None, log.read_text()
        time.sleep(0.05)


def states(folder: Path) -> dict[str, str]:
    path = folder / "sweep.json"
    if not path.is_file():
        return {}
    return {name: trial["state"] for name, trial in json.loads(path.read_text())["trials"].items()}


def steps(trial: Path) -> list[int]:
    """Steps in the metrics of a trial."""
    path = trial / "metrics.jsonl"
    if not path.is_file():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line)["step"] for line in whole]


def kill_a_rank(driver: subprocess.Popen[bytes], trial: str) -> bool:
    """Kills one of the ranks of a trial, as soon as there is one."""
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            is_rank = "RANK" in process.environ() and any(trial in word for word in process.cmdline())
        except psutil.Error:
            continue
        if is_rank:
            process.kill()
            return True
    return False


def test_six_trials_of_two_ranks_two_failures_and_a_killed_driver(tmp_path: Path, start: Start) -> None:
    data, folder, log = write_tiny_dataset(tmp_path / "data"), tmp_path / "sweep", tmp_path / "log"
    last_step = 120  # most of them after the first save, where the driver is killed: seconds
    changed = [f"trainer.max_steps={last_step}", "trainer.save_every=5", "trainer.eval_every=40"]
    ranks = ["launcher=local", "launcher.nproc_per_node=2", "sweep.parallel=1"]
    base = tiny_overrides(data, folder, *changed)
    words = ["--multirun", *base, *ranks, "data.batch_size=2,4,6,3,12,8"]
    driver = start(words)
    cut = folder / "data.batch_size-4"
    wait_until(lambda: (cut / "checkpoints/step-00000005").is_dir(), driver, log)
    driver.kill()
    driver.wait()
    assert states(folder) | {"data.batch_size-2": "finished", "data.batch_size-4": "running"} == states(folder)
    done = folder / "data.batch_size-2/trial.log"
    written = done.stat().st_mtime_ns

    driver = start(words)
    wait_until(lambda: kill_a_rank(driver, KILLED_TRIAL), driver, log)
    assert driver.wait(BOUND) == 1, log.read_text()
    rows = {row["trial"]: row for row in json.loads((folder / "results.json").read_text())}
    finished = [name for name, row in rows.items() if row["state"] == "finished"]
    assert sorted(finished) == [f"data.batch_size-{size}" for size in (2, 4, 6, 8)]
    assert rows["data.batch_size-3"]["reason"].startswith("data.batch_size=3: must be a multiple")
    assert "SIGKILL" in rows[KILLED_TRIAL]["reason"]
    assert done.stat().st_mtime_ns == written
    for name in finished:
        assert steps(folder / name) == list(range(1, last_step + 1))
        assert rows[name]["step"] == last_step
    assert "resuming from" in (cut / "trial.log").read_text()
    alone = [*base, "data.batch_size=4", f"output_dir={tmp_path / 'alone'}"]
    run_ranks("reformer_dist.train", 2, alone)
    last = json.loads((tmp_path / "alone/metrics.jsonl").read_text().splitlines()[-1])
    assert rows["data.batch_size-4"]["eval/loss"] == last["eval/loss"]

    report = (folder / "results.json").read_text()
    run_command("reformer-train", *words, status=1)
    assert (folder / "results.json").read_text() == report


def test_a_stopped_driver_saves_and_resumes(tmp_path: Path, start: Start) -> None:
    data, folder, log = write_tiny_dataset(tmp_path / "data"), tmp_path / "sweep", tmp_path / "log"
    base = tiny_overrides(data, folder, "trainer.max_steps=100000", "trainer.save_every=0")
    words = ["--multirun", *base, "model.n_hashes=1,2", "sweep.parallel=1"]
    trial = folder / "model.n_hashes-1"
    for signum, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        before = len(steps(trial))
        driver = start(words)
        wait_until(lambda so_far=before: len(steps(trial)) > so_far + 2, driver, log)
        driver.send_signal(signum)
        assert driver.wait(BOUND) == status, log.read_text()
        assert states(folder) == {"model.n_hashes-1": "interrupted", "model.n_hashes-2": "waiting"}
        assert list((trial / "checkpoints").glob("step-*"))
    assert steps(trial) == list(range(1, len(steps(trial)) + 1))


def test_a_study_resumes_after_a_kill_and_its_best_trial_continues(tmp_path: Path, start: Start) -> None:
    pytest.importorskip("optuna")
    data, folder, log = write_tiny_dataset(tmp_path / "data"), tmp_path / "study", tmp_path / "log"
    base = tiny_overrides(data, folder, "trainer.max_steps=12", "trainer.eval_every=2", "trainer.save_every=4")
    search = ["sweep=optuna", "sweep.n_trials=12", "sweep.parallel=2", "sweep.prune_after=4"]
    words = [*base, *search, "optim.lr=tag(log,interval(1e-6,1e-1))", "model.n_hashes=1,2"]
    driver = start(words)
    wait_until(lambda: list(states(folder).values()).count("finished") >= 3, driver, log)
    driver.kill()
    driver.wait()
    before = {name for name, state in states(folder).items() if state == "finished"}
    written = {name: (folder / name / "trial.log").stat().st_mtime_ns for name in before}
    output = run_command("reformer-train", *words, timeout=BOUND)
    found = states(folder)
    assert sorted(found) == [f"trial-{number:04d}" for number in range(12)]
    assert set(found.values()) <= {"finished", "pruned"}
    assert {name: (folder / name / "trial.log").stat().st_mtime_ns for name in before} == written

    rows = json.loads((folder / "results.json").read_text())
    best = min((row for row in rows if row["state"] == "finished"), key=lambda row: row["eval/loss"])
    assert rows[0] == best and f"best: {best['trial']}" in output
    (command,) = re.findall(r"^reformer-train .*$", output, flags=re.MULTILINE)
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{best['trial']}/checkpoints/step-00000012" in done.stdout  # resumed from there
    assert steps(folder / best["trial"])[-1] == 24


def test_trials_are_ranked_by_a_metric_of_their_task(tmp_path: Path) -> None:
    """F1 of held-out questions, which reformer-evaluate measures after each trial."""
    contexts = [f"In {year} the bridge over river {year % 7} was built." for year in range(1800, 1830)]
    samples = [
        RawSample(f"q{n}", (b"When?", context.encode()), {"answers": [[3, context[3:7]]]})
        for n, context in enumerate(contexts)
    ]
    fields = ("question", "context")
    write_samples(samples[6:], tmp_path / "data", ByteTokenizer(), heldout=samples[:6], fields=fields)
    words = [
        "task.kind=question_answering",
        "task.stride=16",
        "model.causal=false",
        "sweep.objective=task/f1",
        "sweep.task_rows=6",
    ]
    words = tiny_overrides(tmp_path / "data", tmp_path / "sweep", "trainer.max_steps=2", *words)
    output = run_command("reformer-train", "--multirun", *words, "optim.lr=1e-3,1e-2", timeout=BOUND)
    rows = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert [row["state"] for row in rows] == ["finished"] * 2
    assert rows[0]["task/f1"] >= rows[1]["task/f1"] >= rows[1]["task/exact_match"] >= 0
    assert f"best: {rows[0]['trial']}" in output
