"""The `--dry-run` command and its traffic estimates."""

from __future__ import annotations

import sys

import pytest
from support.launch import run_ranks
from support.tiny import tiny_config, tiny_overrides

from reformer_dist.errors import ConfigError, UserError
from reformer_dist.models import ReformerLM
from reformer_dist.parallel.traffic import head_bytes
from reformer_dist.planning.plan import measure_libraries
from reformer_dist.planning.sizes import JobSpec
from reformer_dist.planning.states import count_parameters
from reformer_dist.planning.traffic import HEADS, exchange_traffic, zero_traffic
from reformer_dist.run.dry_run import dry_run, read_memory


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["launcher.kind=local", "launcher.nproc_per_node=3"],
            r"data\.batch_size=4: .*\b3 data-parallel ranks",
        ),
        (["launcher.nproc_per_node=2"], r"launcher\.nproc_per_node=2: .*launcher=local"),
        (["trainer.precision=fp16"], r"trainer\.precision=fp16: .*GPU"),
        (["data.path=nowhere"], "nowhere"),
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
