"""Bad input: one clear message, a non-zero status, no hang with two processes, and nothing lost."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest
from support.launch import run_ranks
from support.tiny import tiny_overrides, write_tiny_dataset

pytestmark = pytest.mark.jobs

TRAIN = "reformer_dist.train"


def complaint(output: str) -> str:
    """The error message; there must be exactly one, and no traceback of this package."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    ours = [line for line in output.splitlines() if 'File "' in line and "reformer_dist" in line]
    assert not ours, output
    return lines[0]


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def damaged(data: Path, tmp_path: Path, damage) -> Path:
    """A copy of a dataset with its second training shard damaged."""
    copy = tmp_path / "damaged"
    shutil.copytree(data, copy)
    damage(sorted(copy.glob("train-*.tar"))[1])
    return copy


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1500])


@pytest.mark.parametrize("world", [1, 2])
def test_missing_shard(tiny_data, tmp_path, world):
    data = damaged(tiny_data, tmp_path, Path.unlink)
    words = complaint(run_ranks(TRAIN, world, tiny_overrides(data, tmp_path / "run"), fails=True))
    assert "train-000001.tar" in words and "missing" in words


def test_torn_shard(tiny_data, tmp_path):
    data = damaged(tiny_data, tmp_path, truncate)
    words = complaint(run_ranks(TRAIN, 2, tiny_overrides(data, tmp_path / "run"), fails=True, forked=True))
    assert "train-000001.tar" in words and "1500" in words


def test_shard_torn_while_training_ends_every_rank(tiny_data, tmp_path):
    """Of correct size, but damaged: only the rank that reads it notices, and must not leave the other waiting."""

    def scramble(path: Path) -> None:
        path.write_bytes(b"\x01" * path.stat().st_size)

    data = damaged(tiny_data, tmp_path, scramble)
    overrides = tiny_overrides(data, tmp_path / "run", "trainer.max_steps=400", "trainer.log_every=100")
    words = complaint(run_ranks(TRAIN, 2, overrides, fails=True, forked=True))
    assert "train-000001.tar" in words


def test_no_data_set(tmp_path):
    overrides = tiny_overrides(tmp_path / "nothing", tmp_path / "run")
    words = complaint(run_ranks(TRAIN, 1, overrides, fails=True, forked=True))
    assert "nothing" in words and "reformer-shards" in words


@pytest.mark.parametrize("key", ["nproc_per_node=2", "nnodes=2", "hosts=['node1']", "max_restarts=1"])
def test_keys_of_a_launcher_without_one(monkeypatch, key):
    """They are checked before any slow import. Ranks of a launched job ignore them."""
    from reformer_dist.errors import ConfigError
    from reformer_dist.run.compose import run_config_from
    from reformer_dist.run.dry_run import count_ranks
    from reformer_dist.train import train

    monkeypatch.delenv("RANK", raising=False)
    config = run_config_from({}, [f"launcher.{key}"])
    with pytest.raises(ConfigError, match=rf"^launcher\.{re.escape(key)}: .*launcher=(local|torchrun)"):
        train(config)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert count_ranks(config) == (3, 3)


def test_no_heldout_documents(tmp_path):
    data = write_tiny_dataset(tmp_path / "data", heldout_fraction=0.0)
    overrides = tiny_overrides(data, tmp_path / "run", "trainer.eval_every=3")
    words = complaint(run_ranks(TRAIN, 2, overrides, fails=True, forked=True))
    assert "trainer.eval_every=0" in words


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dimm=3", ["model.dimm", "mean model.dim"]),
        ("data.seq_len=4000", ["data.seq_len=4000", "128"]),
        ("data.batch_size=3", ["data.batch_size=3", "2"]),
        ("trainer.micro_batch_size=3", ["trainer.micro_batch_size=3"]),
    ],
)
def test_bad_override_on_two_ranks(tiny_data, tmp_path, override, expected):
    overrides = [*tiny_overrides(tiny_data, tmp_path / "run"), override]
    words = complaint(run_ranks(TRAIN, 2, overrides, fails=True, forked=True))
    assert all(part in words for part in expected), words
    assert not (tmp_path / "run").exists()


def test_ranks_that_were_given_different_configurations(tiny_data, tmp_path):
    script = Path(__file__).with_name("odd_rank.py")
    words = complaint(run_ranks(script, 2, tiny_overrides(tiny_data, tmp_path / "run"), fails=True, forked=True))
    assert "ranks 1" in words and "configuration" in words
    assert not (tmp_path / "run").exists()


def test_shared_layers_with_stage_3(tiny_data, tmp_path):
    overrides = tiny_overrides(tiny_data, tmp_path / "run", "model.share_layers=true", "deepspeed=zero3")
    words = complaint(run_ranks(TRAIN, 1, overrides, fails=True, forked=True))
    assert "model.share_layers=true" in words and "deepspeed.stage=3" in words


def test_resume_path_that_is_no_checkpoint(tiny_data, tmp_path):
    overrides = tiny_overrides(tiny_data, tmp_path / "run", f"resume={tiny_data}")
    words = complaint(run_ranks(TRAIN, 2, overrides, fails=True, forked=True))
    assert str(tiny_data) in words and "checkpoint" in words


def test_checkpoint_of_another_model_leaves_the_run_as_it_was(tiny_data, trained):
    before = content(trained)
    overrides = tiny_overrides(tiny_data, trained, "model.dim=64")
    output = run_ranks(TRAIN, 2, overrides, fails=True, forked=True)
    words = complaint(output)
    assert "model" in words and "model.dim: 32 -> 64" in output
    assert content(trained) == before


def test_run_directory_that_can_not_be_written(tiny_data, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("a file where a folder should be")
    words = complaint(run_ranks(TRAIN, 2, tiny_overrides(tiny_data, blocker / "run"), fails=True, forked=True))
    assert f"output_dir={blocker / 'run'}" in words and "written" in words


def test_prompt_longer_than_the_model_takes(trained):
    arguments = [trained, "--prompt", "x" * 500]
    words = complaint(run_ranks("reformer_dist.generate", 1, arguments, fails=True, forked=True))
    assert "500" in words and "126" in words  # 128 positions, minus the end-of-text token and one to sample


def test_generate_and_evaluate_want_a_checkpoint(tmp_path):
    for name in ("generate", "evaluate"):
        output = run_ranks(f"reformer_dist.{name}", 1, [tmp_path], fails=True, forked=True)
        assert str(tmp_path) in complaint(output)


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature=-1"],
        ["--top-p=0"],
        ["--top-k=-3"],
        ["--max-new-tokens=0"],
        ["--samples=0"],
        ["--repetition-penalty=0"],
        ["--stop="],
        ["--beams=0"],
        ["--length-penalty=1"],
        ["--samples=3", "--beams=2"],
        ["--temperature=0.5", "--beams=2"],
        ["--prompt-file=no/such/file"],
    ],
    ids=" ".join,
)
def test_generate_refuses_senseless_options(options):
    """In this process: options are checked before anything is loaded."""
    from reformer_dist.errors import ConfigError
    from reformer_dist.generate import build_parser, run_generation

    with pytest.raises(ConfigError, match=options[0].split("=")[0].lstrip("-")):
        run_generation(build_parser().parse_args(["nowhere", *options]))


def test_generate_refuses_an_empty_prompt_file_and_unknown_options(tmp_path, capsys):
    from reformer_dist.errors import ConfigError
    from reformer_dist.generate import build_parser, run_generation

    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ConfigError, match=r"empty\.txt: .*empty"):
        run_generation(build_parser().parse_args(["nowhere", "--prompt-file", str(empty)]))
    with pytest.raises(SystemExit):
        build_parser().parse_intermixed_args(["nowhere", "--beam-width", "3"])
    assert "unrecognized arguments: --beam-width" in capsys.readouterr().err
