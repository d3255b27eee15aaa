"""Renamed keys: old names are refused, and what earlier versions have saved still loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from reformer_dist.checkpoint.export import saved_model_config
from reformer_dist.checkpoint.record import RunRecord
from reformer_dist.config import CompatConfig, DataConfig, ModelConfig, ParallelConfig, RunConfig, StreamMerge
from reformer_dist.config.parallel import Combine
from reformer_dist.config.renamed import RENAMED, translate_saved
from reformer_dist.errors import ConfigError
from reformer_dist.run.compose import compose_run, run_config_from, to_dict
from reformer_dist.run.pretrained import load_model
from reformer_dist.sweep.request import parse_request

# run.json of a run that set every key that was renamed, as far as keys don't exclude each other
SAVED = Path(__file__).with_name("run_before_renames.json")
WRITTEN = [
    ("parallel.merge_returns", "false", "parallel.combine=per_round"),
    ("parallel.merge_returns", "True", "parallel.combine=merged"),
    ("data.max_damaged_share", "0.5", "data.max_damaged_fraction=0.5"),
    ("task.mask_share", "0.2", "task.mask_prob=0.2"),
    ("model.attention_implementation", "torch", "model.attention_backend=torch"),
    ("model.chunk_wrap", "true", "model.compat.chunk_wrap=true"),
    ("model.merge_streams", "concat", "model.compat.merge_streams=concat"),
]


def saved() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(SAVED.read_text())
    return document


def expect_current(config: RunConfig) -> None:
    compat = CompatConfig(hash_seed=3, chunk_wrap=True, local_chunk_len=16, merge_streams=StreamMerge.concat)
    assert config.model.compat == compat
    assert config.data.max_damaged_fraction == 0.02


def keys_of(tree: dict[str, Any], prefix: str = "") -> set[str]:
    groups = [keys_of(value, f"{prefix}{key}.") for key, value in tree.items() if isinstance(value, dict)]
    return {f"{prefix}{key}" for key in tree}.union(*groups)


def test_new_names_exist_and_old_ones_do_not() -> None:
    keys = keys_of(to_dict(RunConfig()))
    assert {new.key for new in RENAMED.values()} <= keys
    assert not set(RENAMED) & keys
    assert set(RENAMED) <= keys_of(saved()["config"])


@pytest.mark.parametrize(("old", "value", "new"), WRITTEN)
def test_a_command_line_is_told_the_new_name(old: str, value: str, new: str) -> None:
    for word in (f"{old}={value}", f"+{old}={value}", f"++{old}={value}"):
        for read in (compose_run, lambda words: run_config_from(to_dict(RunConfig()), words), parse_request):
            with pytest.raises(ConfigError) as caught:
                read([word])
            assert str(caught.value).startswith(f"{old}={value}: ")
            assert str(caught.value).endswith(f" {new}")


def test_a_sweep_over_an_old_name() -> None:
    with pytest.raises(ConfigError, match=r"^model\.chunk_wrap=true,false: .* model\.compat\.chunk_wrap=true,"):
        parse_request(["model.chunk_wrap=true,false"])


def test_an_old_name_in_a_yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.yaml").write_text("defaults: [schema, _self_]\nparallel:\n  merge_returns: false\n")
    monkeypatch.setattr("reformer_dist.run.command_line.conf_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"^parallel\.merge_returns: .* parallel\.combine .*per_round for false"):
        compose_run([])


def test_an_old_name_in_a_program() -> None:
    with pytest.raises(ConfigError, match=r"^parallel\.merge_returns=false: .* parallel\.combine=per_round$"):
        ParallelConfig(merge_returns=False)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"^model\.hash_seed=3: .* model\.compat\.hash_seed=3$"):
        ModelConfig(hash_seed=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_damage"):
        DataConfig(max_damage=0.5)  # type: ignore[call-arg]


def test_a_checkpoint_written_before() -> None:
    config = run_config_from(RunRecord.from_json(saved()).config, [])
    expect_current(config)
    assert config.parallel.combine is Combine.per_round
    assert config.model.attention_backend.name == "torch"
    changed = run_config_from(saved()["config"], ["model.compat.chunk_wrap=false", "parallel.combine=merged"])
    assert (changed.model.compat.chunk_wrap, changed.parallel.combine) == (False, Combine.merged)


def test_config_yaml_written_before(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(saved()["config"])))
    config: Any = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))
    expect_current(run_config_from(config, []))


def test_an_export_written_before(tmp_path: Path) -> None:
    document = saved() | {"step": 2}
    (tmp_path / "config.json").write_text(json.dumps(document))
    weights = {name: torch.full(shape, 0.01) for name, shape in document["shapes"].items()}
    save_file(weights, tmp_path / "model.safetensors")
    expect_current(load_model(tmp_path, ["model.n_hashes=1"], torch.device("cpu")).config)
    started = compose_run([f"init_from={tmp_path}", "model.n_hashes=8", "model.compat.local_chunk_len=32"])
    assert started.model.compat == CompatConfig(
        hash_seed=3, chunk_wrap=True, local_chunk_len=32, merge_streams=StreamMerge.concat
    )
    assert started.model.attention_backend.name == "auto"  # what the run trained with does not matter
    assert "attention_backend" not in saved_model_config(str(tmp_path))


def test_translation_leaves_current_configurations_and_its_argument_alone() -> None:
    current = to_dict(RunConfig())
    assert translate_saved(current) == current
    before = saved()["config"]
    translate_saved(before)
    assert before == saved()["config"]
    assert translate_saved({}) == {}
