"""Options of reformer-train that are not Hydra's, and whole numbers as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from reformer_dist.errors import ConfigError
from reformer_dist.run.command_line import ConfigFiles
from reformer_dist.run.compose import compose_run, run_config_from, to_dict
from reformer_dist.run.options import take_options
from reformer_dist.run.whole_numbers import whole_number


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("--dry-run", "--dry-run"),
        ("--dry-run=80GiB", "--dry-run=80GiB"),
        ("--dry-run 80GiB", "--dry-run=80GiB"),
        ("--dry-run=1GiB --dry-run 80GiB", "--dry-run=80GiB"),
        ("--dry-run model.dim=8", "--dry-run"),
        ("--dry-run ~tracker", "--dry-run"),
        ("--dry-run --multirun", "--dry-run"),
    ],
)
def test_the_size_of_a_dry_run_follows_with_or_without_an_equals_sign(line: str, flag: str) -> None:
    options = take_options(["data.seq_len=64", *line.split()])
    assert options.dry_run == flag
    others = [word for word in line.split() if "GiB" not in word and word != "--dry-run"]
    assert options.rest == ["data.seq_len=64", *others]


def test_options_are_taken_out_wherever_they_are() -> None:
    options = take_options(["--plot", "a.png", "model.dim=8", "--explain", "model", "--version", "--dry-run"])
    assert (options.plot, options.explain, options.version) == (Path("a.png"), "model", True)
    assert options.rest == ["model.dim=8"]
    assert take_options(["--explain"]).explain == "" and take_options([]).explain is None


@pytest.mark.parametrize("line", ["--plot", "--plot=", "--plot=a.png", "--dry-run --plot", "--dry-run --plot="])
def test_a_plot_needs_a_dry_run_and_a_file(line: str) -> None:
    with pytest.raises(ConfigError, match="--plot"):
        take_options(line.split())


@pytest.mark.parametrize(
    ("written", "read"),
    [("1e3", "1000"), ("1.5e3", "1500"), ("1000.0", "1000"), ("-1E2", "-100"), ("1e+2", "100")]
    + [(text, text) for text in ("1e-3", "1.5", "1e99", "1e999999999", "7", "abc", "e", "1e", "")],
)
def test_whole_number(written: str, read: str) -> None:
    assert whole_number(written) == read


def test_whole_numbers_may_have_an_exponent() -> None:
    words = ["trainer.max_steps=1e3", "+model.axial_shape=[3.2e1,64]", "optim.decay_from=null", "optim.lr=1e3"]
    config = compose_run([*words, "trainer.micro_batch_size=4.0", "output_dir='1e3'"])
    assert (config.trainer.max_steps, config.trainer.micro_batch_size) == (1000, 4)
    assert (config.model.axial_shape, config.optim.lr, config.output_dir) == ([32, 64], 1000.0, "1e3")
    again = run_config_from(to_dict(config), ["trainer.max_steps=2e3"])
    assert again.trainer.max_steps == 2000


def test_one_in_a_yaml_file_is_told_how_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 1e3\n")
    with pytest.raises(ConfigError, match=r"trainer\.max_steps=1000\.0: .*write 1000$"):
        compose_run(["experiment=mine"], ConfigFiles(str(tmp_path)))
