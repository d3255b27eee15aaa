"""From files and overrides to a RunConfig, and back; what is not known is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support.launch import run_ranks

from reformer_dist.config import AttentionKind, ModelConfig, Recompute, RunConfig
from reformer_dist.errors import ConfigError
from reformer_dist.run.command_line import conf_folder
from reformer_dist.run.compose import compose_run, run_config_from, to_dict, to_yaml

YAMLS = sorted(conf_folder().rglob("*.yaml"))


@pytest.fixture
def composed() -> Callable[..., RunConfig]:
    """What a command line with these overrides would run."""
    return lambda *overrides: compose_run(list(overrides))


def choices() -> list[str]:
    """group=choice for every file in the groups of conf/."""
    files = (path.relative_to(conf_folder()) for path in YAMLS)
    return [f"{path.parent}={path.stem}" for path in files if path.parent != Path()]


def test_there_are_choices() -> None:
    assert {"experiment=quickstart", *(f"deepspeed=zero{stage}" for stage in range(4))} <= set(choices())


@pytest.mark.parametrize("choice", choices())
def test_every_file_composes(composed: Callable[..., RunConfig], choice: str) -> None:
    group = choice.partition("=")[0]
    # a group that conf/train.yaml does not name is added
    added = "" if group in ("deepspeed", "experiment", "launcher", "sweep", "tracker") else "+"
    config = composed(f"{added}{choice}")
    assert config.micro_batching(config.parallel.sequence)


def test_stages(composed: Callable[..., RunConfig]) -> None:
    assert [composed(f"deepspeed=zero{stage}").deepspeed.stage for stage in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_files_name_no_code_and_no_clock(path: Path) -> None:
    text = path.read_text()
    assert "_target_" not in text
    assert "${now" not in text  # ranks would differ


def test_overrides_win(composed: Callable[..., RunConfig]) -> None:
    config = composed("model.layers=[lsh]", "model.recompute=none", "trainer.micro_batch_size=null")
    assert config.model.layers == [AttentionKind.lsh]
    assert config.model.recompute is Recompute.none
    assert config.trainer.micro_batch_size is None


BAD = [
    ("model.dimm=3", ["model.dimm=3: ", "no such key", "mean model.dim"]),
    ("lr=1e-3", ["lr=1e-3: ", "mean optim.lr"]),
    ("trainer.lr=1", ["trainer.lr=1: ", "mean optim.lr"]),
    ("kind=slurm", ["kind=slurm: ", "task.kind, ", "or sweep.kind"]),
    ("model.num_hashes=4", ["model.num_hashes=4: ", "use n_hashes"]),
    ("trainer.max_steps=1.5e0", ["trainer.max_steps=1.5: ", "whole number"]),
    ("+model.foo=1", ["model.foo=1", "no such key"]),
    ("++model.foo=1", ["model.foo=1", "no such key"]),
    ("+foo=1", ["foo=1", "no such key", "model, data"]),
    ("+model._target_=os.system", ["model._target_=os.system", "no such key"]),
    ("+_target_=os.system", ["_target_=os.system", "no such key"]),
    ("+model.layer_kinds=1", ["model.layer_kinds=1", "no such key"]),
    ("+model.max_positions=1", ["model.max_positions=1", "no such key"]),
    ("model.dim=abc", ["model.dim=abc: "]),
    ("model.dim=1.5", ["model.dim=1.5: "]),
    ("model.dim=null", ["model.dim"]),
    ("model.causal=maybe", ["model.causal=maybe: "]),
    ("model.position=polar", ["model.position=polar: ", "axial, rotary, "]),
    ("model.layers=[lsh,far]", ["model.layers[1]=far: ", "lsh, local"]),
    ("model.layers=lsh", ["model.layers", "model.layers=[local,lsh]"]),
    ("model.encoder_layers=lsh", ["model.encoder_layers=[a,b]"]),
    ("optim.lr=fast", ["optim.lr=fast: "]),
    ("deepspeed=zero4", ["deepspeed=zero4: ", "zero0, zero1, zero2"]),
    ("experiment=quick", ["experiment=quick: ", "mean quickstart"]),
    ("launcher=slrm", ["launcher=slrm: ", "mean slurm"]),
    ("data.path=${nothing}", ["data.path", "nothing"]),
    ("data.path=${oc.env:NO_SUCH_VARIABLE}", ["data.path", "NO_SUCH_VARIABLE"]),
    ("model.n_buckets=7", ["model.n_buckets=7"]),
    ("data.batch_size=0", ["data.batch_size=0"]),
]


@pytest.mark.parametrize(("override", "words"), BAD, ids=[override for override, _ in BAD])
def test_bad_overrides(override: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real entry, in this process: it must not get as far as training."""
    monkeypatch.setattr("sys.argv", ["reformer-train", override])
    with pytest.raises(ConfigError) as caught:
        _enter()
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def _enter() -> None:
    from reformer_dist.sweep.request import run_or_sweep

    def refuse(config: RunConfig) -> None:
        raise AssertionError(f"accepted: {config}")

    run_or_sweep(refuse, refuse)


@pytest.mark.jobs
def test_users_see_one_line(tmp_path: Path) -> None:
    output = run_ranks("reformer_dist.train", 1, ["model.dimm=3", f"output_dir={tmp_path / 'run'}"], fails=True)
    assert output.startswith("error: model.dimm")
    assert len(output.splitlines()) == 1
    assert not list(tmp_path.iterdir())


SAVED_BAD = [
    ("model.dimm=3", "mean model.dim"),
    ("model._target_=os.system", "_target_"),
    ("model.layer_kinds=1", "layer_kinds"),
    ("model.dim=abc", "model.dim=abc: "),
    ("model.layers=lsh", "model.layers=[local,lsh]"),
    ("model.dim=[1", "YAML"),
    ("model=3", "ModelConfig"),
    ("=3", "no such key"),
    ("", "no such key"),
]


@pytest.mark.parametrize(("override", "word"), SAVED_BAD, ids=[override or "empty" for override, _ in SAVED_BAD])
def test_bad_overrides_of_a_saved_configuration(override: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config_from(to_dict(RunConfig()), [override])
    assert word in str(caught.value)


def test_saved_configuration_goes_round(composed: Callable[..., RunConfig]) -> None:
    config = composed("experiment=quickstart", "deepspeed=zero2", "model.head_dim=16", "trainer.precision=bf16")
    assert run_config_from(to_dict(config), []) == config
    changed = run_config_from(to_dict(config), ["model.n_hashes=8", "data.path=a=b"])
    assert (changed.model.n_hashes, changed.data.path) == (8, "a=b")
    assert config.model.n_hashes != 8


def test_yaml_goes_round(composed: Callable[..., RunConfig]) -> None:
    config = composed("optim.lr=1e-7", "model.layers=[exact]", "output_dir='a: [b'")
    again = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert isinstance(again, dict)
    assert run_config_from(again, []) == config


def test_saved_configuration_is_checked_again() -> None:
    saved = to_dict(RunConfig(model=ModelConfig(n_layers=2)))
    saved["model"]["n_buckets"] = 7
    with pytest.raises(ConfigError, match=r"model\.n_buckets=7"):
        run_config_from(saved, [])


def test_several_data_sets(composed: Callable[..., RunConfig]) -> None:
    """By the command line, and again from what a run has saved."""
    config = composed("data.path=[a,'s3://b/c']", "data.weights=[1,3]")
    assert (config.data.paths(), config.data.weights) == (["a", "s3://b/c"], [1.0, 3.0])
    assert run_config_from(to_dict(config), []).data == config.data
    assert run_config_from(to_dict(config), ["data.path=d", "data.weights=null"]).data.paths() == ["d"]
