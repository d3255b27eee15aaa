"""reformer-runs on directories as training leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reformer_dist.errors import ConfigError
from reformer_dist.fs.lock import RunLock
from reformer_dist.runs.__main__ import build_parser, run_subcommand
from reformer_dist.runs.summary import RunState, RunSummary

START = {
    "time": "2026-11-30T10:00:00+00:00",
    "step": 0,
    "command": "reformer-train model.dim=64",
    "working_directory": "/home/user",
    "world_size": 2,
    "hosts": {"node1": {"device": "cpu", "ranks": [0, 1]}},
    "machine": {"system": "Linux", "cores": 2, "memory_gib": 8.0},
    "versions": {"torch": "2.13.0"},
    "commits": {},
    "environment": {"OMP_NUM_THREADS": "1"},
}


def write_run(folder: Path, dim: int, losses: list[float]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model:\n  dim: {dim}\ntrainer:\n  max_steps: 3\noutput_dir: {folder}\n")
    rows = [
        {"step": step, "time_s": 3600.0 * step, "train/loss": loss, "perf/tokens_per_s": 1000.0}
        for step, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "starts.jsonl").write_text(f'{json.dumps(START)}\n{{"time": ')  # killed while it wrote the second
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "small", 64, [5.0, 4.0, 3.0])
    write_run(tmp_path / "sweep/large", 128, [4.5, 3.5])
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):
    def run(*words: object) -> str:
        run_subcommand(build_parser().parse_args(list(map(str, words))))
        return capsys.readouterr().out

    return run


def test_a_list_of_runs(said, runs: Path) -> None:
    header, small, large = said("ls", runs).splitlines()
    assert header.split() == ["run", "state", "step", "loss", "tokens/s", "hours", "started"]
    assert small.split() == ["small", "finished", "3/3", "3", "1,000", "3", "2026-11-30", "10:00"]
    assert large.split()[:5] == ["sweep/large", "stopped", "2/3", "3.5", "1,000"]
    assert [row["loss"] for row in json.loads(said("ls", runs, "--json"))] == [3.0, 3.5]


def test_a_run_is_running_while_its_lock_is_held(runs: Path) -> None:
    """By another process: POSIX locks do not exclude their own."""
    import subprocess
    import sys

    code = "import sys; from pathlib import Path; from reformer_dist.fs.lock import RunLock\n"
    code += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(runs / "small")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert RunSummary(runs / "small").state is RunState.running
        holder.kill()
    assert RunSummary(runs / "small").state is RunState.finished
    RunLock(runs / "small").close()


def test_one_run(said, runs: Path) -> None:
    output = said("show", runs / "small")
    assert output.startswith(f"{runs / 'small'}: finished, step 3 of 3")
    for words in ("reformer-train model.dim=64", "2 of 2 ranks on cpu", "torch 2.13.0", "OMP_NUM_THREADS 1"):
        assert words in output
    assert "  model.dim: 256 -> 64\n" in output and "  train/loss: 3\n" in output
    document = json.loads(said("show", runs / "small", "--json"))
    assert document["starts"] == [START] and document["metrics"]["train/loss"] == 3.0


def test_runs_side_by_side(said, runs: Path, tmp_path: Path) -> None:
    plot = tmp_path / "losses.png"
    output = said("compare", runs / "small", runs / "sweep/large", "--plot", plot)
    rows = [line.split("  ") for line in output.splitlines() if line]
    table = {row[0].strip(): [cell.strip() for cell in row[1:] if cell] for row in rows}
    assert table["key"] == ["small", "sweep/large"] and table["model.dim"] == ["64", "128"]
    assert "output_dir" not in table
    assert table["loss"] == ["3", "3.5"] and table["loss at step 2"] == ["4", "3.5"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    # a directory stands for the runs in it
    document = json.loads(said("compare", runs, "--json", "--metric", "train/loss"))
    assert [row["key"] for row in document["keys"]] == ["model.dim"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "nowhere"], "nowhere: is no directory"),
        (["ls", "empty"], "empty: holds no runs"),
        (["show", "empty"], "empty: has no config.yaml"),
        (["show", "broken"], "broken/config.yaml: is not the configuration"),
        (["compare", "small"], "small: is one run"),
        (["compare", "small", "small"], "names a run twice"),
        (["compare", "small", "sweep/large", "--metric", "loss"], "--metric loss: no run has logged it"),
        (["compare", "small", "sweep/large", "--plot", "nowhere/plot.png"], "--plot"),
    ],
)
def test_what_is_refused(runs: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs / "empty").mkdir()
    (runs / "broken").mkdir()
    (runs / "broken/config.yaml").write_text("[1, 2]")
    monkeypatch.chdir(runs)
    with pytest.raises(Exception, match=message.replace("[", r"\[")) as caught:
        run_subcommand(build_parser().parse_args(words))
    assert isinstance(caught.value, ConfigError) or message == "--plot"
