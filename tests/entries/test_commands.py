"""The installed commands: alone, under torchrun and deepspeed, from a checkout and from a wheel."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.launch import run_ranks
from support.tiny import tiny_overrides

import reformer_dist
from reformer_dist import commands
from reformer_dist.process.exit_status import INTERRUPTED

pytestmark = pytest.mark.jobs

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def run(*command: object, cwd: Path | None = None, **env: str) -> str:
    """Runs a command that must succeed; returns what it printed."""
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_training_leaves_config_checkpoints_and_tensorboard(trained):
    assert (trained / "config.yaml").is_file()
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert list((trained / "tensorboard").glob("events*"))


def test_the_same_command_again_has_nothing_to_do(trained, tiny_data):
    recorded = (trained / "config.yaml").read_text()
    output = run_ranks("reformer_dist.train", 1, tiny_overrides(tiny_data, trained, "optim.lr=0.5"), forked=True)
    assert "resuming from" in output and "nothing to train" in output
    assert (trained / "config.yaml").read_text() == recorded  # no step was trained with another lr


def test_evaluate_prints_bits_per_byte_beside_the_baselines(trained):
    output = run(BIN / "reformer-evaluate", trained)
    assert "held-out bits per byte: " in output
    assert "order-0 entropy of the same text: " in output and "gzip -9 of the same text: " in output


def test_evaluate_on_two_ranks_is_evaluate_on_one(trained):
    def figures(output: str) -> list[str]:
        return [line for line in output.splitlines() if line.startswith("held-out")]

    alone = figures(run_ranks("reformer_dist.evaluate", 1, [trained], forked=True))
    assert len(alone) == 4
    local = ("launcher=local", "launcher.nproc_per_node=2")
    assert figures(run(BIN / "reformer-evaluate", trained, "parallel.sequence=2", *local)) == alone
    document = json.loads(run(BIN / "reformer-evaluate", trained, "--json"))
    assert f"held-out loss: {document['loss']:.4f} nats per token" in alone
    assert document["precision"] == "float32"


def test_generate_goes_on_from_the_prompt_and_repeats_itself_for_a_seed(trained):
    arguments = [trained, "--prompt", "time water", "--max-new-tokens", "20"]
    first = run(BIN / "reformer-generate", *arguments)
    assert first.startswith("time water") and len(first) > len("time water") + 1
    assert run_ranks("reformer_dist.generate", 1, arguments, forked=True) == first
    other = run_ranks("reformer_dist.generate", 1, [*arguments, "--seed", "1"], forked=True)
    assert other.startswith("time water") and other != first


def test_generate_greedily_ignores_the_seed(trained):
    arguments = [trained, "--temperature", "0", "--max-new-tokens", "10"]
    texts = [
        run_ranks("reformer_dist.generate", 1, [*arguments, "--seed", seed], forked=True) for seed in ("0", "1")
    ]
    assert texts[0] == texts[1] != ""


def test_deepspeed_launcher_trains_on_two_processes(tmp_path, tiny_data):
    overrides = tiny_overrides(tiny_data, tmp_path / "run", "deepspeed=zero2", "trainer.eval_every=3")
    launcher = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", "29731"]
    output = run(*launcher, "--module", "reformer_dist.train", *overrides, PATH=f"{BIN}:{os.environ['PATH']}")
    assert "held-out bits per byte" in output
    assert (tmp_path / "run/checkpoints/step-00000006/rank-00001.safetensors").is_file()


@pytest.mark.parametrize("command", ["reformer-evaluate", "reformer-generate"])
def test_help(command):
    output = run(BIN / command, "--help")
    assert "reformer" in output.lower()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--help"], "--dry-run"),
        (["--version"], f"reformer-train {reformer_dist.__version__}"),
        (["--explain", "model.n_hashes"], "Hash rounds of LSH attention"),
        (["lr=1e-3"], "optim.lr"),
        (["--cfg", "job", "model.dim=64"], "dim: 64"),
        (["optim.lrr=1"], "optim.lrr"),
        (["optim.lr=high"], "optim.lr=high"),
        (["trainer.max_steps=0"], "trainer.max_steps=0"),
        (["experiment=none"], "experiment=none"),
        (["trainer.micro_batch_size=3"], "trainer.micro_batch_size=3"),
        (["launcher=local", "launcher.nproc_per_node=3"], "data.batch_size=4"),
    ],
    ids=" ".join,
)
def test_answers_that_need_no_run_do_not_wait_for_torch(arguments, answer):
    command = [sys.executable, "-X", "importtime", "-m", "reformer_dist.train", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer in result.stdout + result.stderr
    imported = {
        line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert "hydra" in imported
    assert not imported & {"torch", "deepspeed", "numpy"}


@pytest.mark.parametrize(
    "name", ["evaluate", "generate", "predict", "convert", "checkpoints", "doctor", "shards", "serve"]
)
def test_version(name, monkeypatch, capsys):
    """Of the commands that argparse reads; in this process, which has imported what they import."""
    monkeypatch.setattr(sys, "argv", [f"reformer-{name}", "--version"])
    with pytest.raises(SystemExit) as ended:
        getattr(commands, name)()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"reformer-{name} {reformer_dist.__version__}\n"


def test_help_names_the_options():
    output = run(BIN / "reformer-train", "--help")
    for option in (
        "--dry-run",
        "--plot",
        "--vocab-size",
        "--explain",
        "--cfg",
        "--multirun",
        "--config-dir",
        "--version",
    ):
        assert option in output
    assert "experiment=base" in output


def test_cfg_job_prints_the_resolved_configuration():
    output = run(BIN / "reformer-train", "--cfg", "job", "model.dim=64")
    assert "dim: 64" in output and "output_dir:" in output


def test_wheel_carries_conf(tmp_path):
    """An installed wheel composes the same configuration, outside of the checkout."""
    source = tmp_path / "source"
    kept = ["reformer_dist", "conf", "pyproject.toml", "README.md", "LICENSE"]
    source.mkdir()
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, source)
    shutil.rmtree(source)
    command = [sys.executable, "-m", "reformer_dist.train", "--cfg", "job", "experiment=quickstart"]
    installed = run(*command, cwd=tmp_path, PYTHONPATH=str(site))
    assert installed == run(BIN / "reformer-train", "--cfg", "job", "experiment=quickstart")


@pytest.mark.parametrize("name", ["evaluate", "generate", "predict", "convert", "doctor", "checkpoints", "serve"])
def test_an_interrupt_while_modules_are_loaded_leaves_no_trace(name):
    command = [sys.executable, "-X", "importtime", "-c", f"from reformer_dist.commands import {name}; {name}()"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert any(line.split("|")[-1].strip() == "torch.version" for line in process.stderr)
        process.send_signal(signal.SIGINT)
        complaints = process.stderr.read()
    assert process.returncode == INTERRUPTED
    assert [line for line in complaints.splitlines() if not line.startswith("import time:")] == []
