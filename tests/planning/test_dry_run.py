"""The `--dry-run` command and its traffic estimates."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.launch import run_ranks
from support.tiny import tiny_config, tiny_overrides

from reformer_dist import train
from reformer_dist.config import TaskKind
from reformer_dist.config.stages import resolve_stages
from reformer_dist.config.task import CAUSAL_TASKS
from reformer_dist.errors import ConfigError, UserError
from reformer_dist.models import ReformerLM
from reformer_dist.parallel.traffic import head_bytes
from reformer_dist.planning.plan import measure_libraries
from reformer_dist.planning.sizes import JobSpec
from reformer_dist.planning.states import count_parameters
from reformer_dist.planning.traffic import HEADS, exchange_traffic, zero_traffic
from reformer_dist.run.data import open_task_data
from reformer_dist.run.dry_run import dry_run, plan_run, read_memory
from reformer_dist.run.memory_check import plan_largest_step


@pytest.mark.jobs
def test_it_prints_the_plan_and_writes_nothing(tiny_data, tmp_path):
    words = ["launcher=local", "launcher.nproc_per_node=4", "parallel.sequence=2", "deepspeed=zero2"]
    overrides = tiny_overrides(tiny_data, tmp_path / "run", *words, "--dry-run=80GiB")
    output = run_ranks("reformer_dist.train", 1, overrides, forked=True)
    for line in ("4 ranks on cuda, 4 per node; 2 data-parallel", "  fits in 80.00 GiB", "exchange of heads"):
        assert line in output
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_too_large_is_reported(tiny_data, tmp_path, capsys):
    config = tiny_config(tiny_data, tmp_path, "data.seq_len=4096", "model.axial_shape=[64,64]")
    dry_run(config, "--dry-run=1MiB")
    assert "NOT FIT in 1.0 MiB" in capsys.readouterr().out


STAGED = (
    "stages=[{until: 2, data.seq_len: 32}, {until_tokens: 1536, data.batch_size: 8}]",
    "trainer.max_steps=10",
)


def test_each_stage_is_planned(tiny_data, tmp_path, capsys):
    """2 steps of 4 x 32 tokens, 3 of 8 x 64 (1,280 tokens, rounded up), and 5 of 4 x 64."""
    dry_run(tiny_config(tiny_data, tmp_path, *STAGED, "trainer.micro_batch_size=null"), "--dry-run=80GiB")
    output = capsys.readouterr().out
    assert "stage 2 of 3, whose steps need the most memory" in output and "8 rows of 64" in output
    lines = [line.split() for line in output[output.index("stages        ") :].splitlines()[1:5]]
    assert [line[:5] for line in lines[:3]] == [
        ["1", "1-2", "4", "x", "32"],
        ["2", "3-5", "8", "x", "64"],
        ["3", "6-10", "4", "x", "64"],
    ]
    assert lines[1][-1] == "data.batch_size=8"
    totals = output[output.index("  total       10 steps") :].splitlines()[0]
    assert "10 steps, 3,072 tokens" in totals


def test_the_memory_of_a_run_is_that_of_its_largest_stage(tiny_data, tmp_path, job):
    config = tiny_config(tiny_data, tmp_path, *STAGED, "trainer.micro_batch_size=null")
    spec, peak = plan_largest_step(config, job, open_task_data(config).task)
    assert spec.config == resolve_stages(config)[1].config
    plain = tiny_config(tiny_data, tmp_path, "data.batch_size=8", "trainer.micro_batch_size=null")
    assert peak == plan_largest_step(plain, job, open_task_data(plain).task)[1]


def test_the_schedule_is_drawn(tiny_data, tmp_path, capsys):
    wsd = ("optim.schedule=wsd", "optim.warmup_steps=20", "optim.decay_from=60", "optim.min_lr_ratio=0")
    config = tiny_config(tiny_data, tmp_path, *wsd, "stages=[{until: 50}, {}]", "trainer.max_steps=80")
    dry_run(config, "--dry-run=80GiB", tmp_path / "plot.png")
    chart = capsys.readouterr().out.partition("learning rate wsd, 80 steps\n")[2]
    *rows, marks = [line.partition("|")[2] for line in chart.splitlines()]
    assert marks == "1" + " " * 44 + "2"  # 72 columns for 80 steps
    heights = [sum("▁▂▃▄▅▆▇█".find(row[column : column + 1] or " ") + 1 for row in rows) for column in range(72)]
    assert heights[18:54] == [48] * 36  # steps 20 to 60
    assert heights[:18] == sorted(heights[:18]) and heights[54:] == sorted(heights[54:], reverse=True)
    assert heights[0] < 6 and heights[-1] < 6
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"^--plot=.*nowhere"):
        dry_run(config, "--dry-run=80GiB", tmp_path / "nowhere" / "plot.png")


def test_a_vocabulary_size_takes_the_place_of_the_data(tiny_data, tmp_path, capsys):
    staged = (*STAGED, "trainer.micro_batch_size=null")
    dry_run(tiny_config(tiny_data, tmp_path, *staged), "--dry-run=80GiB")
    planned = capsys.readouterr().out
    dry_run(tiny_config(Path("nowhere"), tmp_path, *staged), "--dry-run=80GiB", vocab_size=257)
    assert capsys.readouterr().out == planned.replace(f"path: {tiny_data}", "path: nowhere")
    with pytest.raises(ConfigError, match=r"^data\.epochs=2: .*--vocab-size"):
        plan_run(tiny_config(Path("nowhere"), tmp_path, "data.epochs=2"), vocab_size=257)


@pytest.mark.parametrize("kind", TaskKind)
def test_every_task_is_planned_without_data(kind, tmp_path):
    words = [f"task.kind={kind.name}", f"model.causal={kind in CAUSAL_TASKS}", "task.max_source_len=64"]
    ((_, plan),), last_step = plan_run(tiny_config(Path("nowhere"), tmp_path, *words), 2.0**30, 1000)
    assert plan.count.total > 1000 * 32 and last_step == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab-size=257"], r"^--vocab-size=257: needs --dry-run"),
        (["--dry-run", "--vocab-size=1"], r"^--vocab-size=1: .*--vocab-size=257"),
        (["--vocab-size", "--dry-run"], r"^--vocab-size: .*--vocab-size=257"),
        (["--vocab-size=bytes", "--dry-run"], r"^--vocab-size=bytes: "),
    ],
)
def test_a_vocabulary_size_is_a_number_beside_the_flag(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reformer-train", *words])
    with pytest.raises(ConfigError, match=message):
        train._run()


def test_groups_of_the_optimizer_are_shown(tiny_data, tmp_path, capsys):
    groups = "optim.groups=[{match: embedding.*, frozen: true}, {match: head.*, lr: 0.5, weight_decay: 0}]"
    dry_run(tiny_config(tiny_data, tmp_path, "optim.kind=muon", groups), "--dry-run")
    shown = capsys.readouterr().out
    for line in (
        r"  muon +1[0-9] tensors, [0-9,]+ parameters, lr 0\.01, weight decay 0\.01",
        r"  adamw +1 tensors, 8,224 parameters, lr 0\.5, weight decay 0",
        r"  frozen +[0-9,]+ parameters",
    ):
        assert re.search(line, shown), line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages=[{until: 2}, {data.batch_size: 50000}]"], r"50000 rows"),
        (["stages=[{until: 2, trainer.micro_batch_size: 3}]"], r"^stages\[0\]: trainer\.micro_batch_size=3: "),
        (
            ["launcher.kind=local", "launcher.nproc_per_node=3"],
            r"data\.batch_size=4: .*\b3 data-parallel ranks",
        ),
        (["launcher.nproc_per_node=2"], r"launcher\.nproc_per_node=2: .*launcher=local"),
        (["trainer.precision=fp16"], r"trainer\.precision=fp16: .*GPU"),
        (["data.path=nowhere"], "nowhere"),
        (["optim.groups=[{match: x.*, lr: 0.1}]"], r"optim\.groups\[0\]\.match=x\.\*: .*matches no"),
    ],
)
def test_invalid_runs_raise_the_errors_of_a_run(words, message, tiny_data, tmp_path):
    with pytest.raises(UserError, match=message):
        dry_run(tiny_config(tiny_data, tmp_path, *words), "--dry-run")


@pytest.mark.parametrize("flag", ["--dry-run=", "--dry-run=80", "--dry-run=many GiB", "--dry-run=0GiB"])
def test_memory_needs_a_number_and_a_unit(flag):
    with pytest.raises(ConfigError, match="--dry-run=80GiB"):
        read_memory(flag)


def test_traffic_follows_the_stage_and_the_recompute(tiny_data, tmp_path):
    def job(*words: str) -> JobSpec:
        return JobSpec(tiny_config(tiny_data, tmp_path, "parallel.sequence=2", *words), 4, 4, 257, "cpu")

    one = job("deepspeed.stage=1")
    count = count_parameters(lambda: ReformerLM(one.config.model, 257))
    gradients, weights = zero_traffic(one, count).values()
    assert gradients == 2 * weights == 2 * 4 * count.total * 3 / 4
    two = zero_traffic(job("deepspeed.stage=2"), count)
    assert two["gradients"] == one.n_micro * gradients
    lsh = job("model.layers=[lsh]", "model.n_layers=1", "parallel.heads=2", "model.recompute=none")
    shape = lsh.layer_shape
    vectors = 3 * shape.tokens * shape.vector / 2
    assert exchange_traffic(lsh)[HEADS] == lsh.n_micro * (head_bytes(shape, 2) + vectors)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_libraries_are_measured_for_the_stage(tiny_data, tmp_path):
    """DeepSpeed imports more modules for higher stages."""
    plain, partitioned = (
        measure_libraries(JobSpec(tiny_config(tiny_data, tmp_path, f"deepspeed.stage={stage}"), 1, 1, 257, "cpu"))
        for stage in (0, 3)
    )
    assert 100 * 2**20 < plain < partitioned < 2**30
