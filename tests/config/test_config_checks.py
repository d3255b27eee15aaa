"""Every check of the configuration fails on what it is for, and names the key and the value."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, get_type_hints

import pytest

from reformer_dist.config import (
    Activation,
    AttentionKind,
    CompatConfig,
    DataConfig,
    DeepSpeedConfig,
    HashScheme,
    LauncherConfig,
    LauncherKind,
    ModelConfig,
    NeighbourRule,
    Norm,
    OptimConfig,
    Position,
    Precision,
    RunConfig,
    StreamMerge,
    TrainerConfig,
)
from reformer_dist.config.checks import ConfigGroup
from reformer_dist.engine.setup import deepspeed_dict
from reformer_dist.errors import ConfigError, UserError

GROUPS = {each.name: type(getattr(RunConfig(), each.name)) for each in fields(RunConfig)}
GROUPS = {name: cls for name, cls in GROUPS.items() if is_dataclass(cls)} | {"model.compat": CompatConfig}
TOO_SMALL = {
    "model.dim": 0,
    "model.n_layers": 0,
    "model.n_heads": 0,
    "model.head_dim": 0,
    "model.n_hashes": 0,
    "model.window": 0,
    "model.chunk_len": 0,
    "model.local_window": 0,
    "model.n_chunks_before": -1,
    "model.n_chunks_after": -1,
    "model.compat.local_chunk_len": -1,
    "model.compat.local_chunks_before": -1,
    "model.compat.local_chunks_after": -1,
    "model.compat.hash_seed": -1,
    "model.ff_dim": 0,
    "model.ff_chunk": -1,
    "model.ff_mult": 0,
    "model.loss_chunk": 0,
    "model.max_seq_len": 0,
    "model.norm_eps": -1e-5,
    "data.seq_len": 1,
    "data.batch_size": 0,
    "data.epochs": -1,
    "data.workers": -1,
    "data.eval_rows": -1,
    "optim.lr": -0.1,
    "optim.eps": -1e-8,
    "optim.weight_decay": -0.01,
    "optim.grad_clip": -1.0,
    "optim.warmup_steps": -1,
    "deepspeed.reduce_bucket_size": 0,
    "deepspeed.param_persistence_threshold": -1,
    "trainer.max_steps": 0,
    "trainer.micro_batch_size": 0,
    "trainer.log_every": -1,
    "trainer.eval_every": -1,
    "trainer.save_every": -1,
    "trainer.sample_every": -1,
    "trainer.keep_checkpoints": -1,
    "trainer.seed": -1,
    "trainer.sample_tokens": 0,
    "trainer.max_skipped_steps": 0,
    "trainer.max_diverged_steps": -1,
}
FLOATS = [key for key, value in TOO_SMALL.items() if isinstance(value, float)]
SHARES = ("model.dropout", "model.attention_dropout", "model.ff_dropout")


ENUM_FIELDS = [
    (key, name, kind)
    for key, cls in GROUPS.items()
    for name, kind in get_type_hints(cls).items()
    if isinstance(kind, type) and issubclass(kind, Enum)
]


def make(key: str, value: object, **others: Any) -> Any:
    """The group of `key` with that field set; a key of model.compat also makes the model around it."""
    group, name = key.partition("[")[0].rsplit(".", 1)
    values = {name: value} | others
    if group != "model.compat":
        return GROUPS[group](**values)
    of_compat = {each.name: values.pop(each.name) for each in fields(CompatConfig) if each.name in values}
    return ModelConfig(compat=CompatConfig(**of_compat), **values).compat


def complains(key: str, value: object, *words: str, **beside: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make(key, value, **beside)
    message = str(caught.value)
    assert f"{key}={value}" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("key", TOO_SMALL)
def test_too_small(key: str) -> None:
    complains(key, TOO_SMALL[key], "at least")


@pytest.mark.parametrize("key", FLOATS)
def test_not_a_number(key: str) -> None:
    complains(key, math.nan, "at least")


@pytest.mark.parametrize("key", [*FLOATS, "data.cache_gb"])
def test_not_finite(key: str) -> None:
    complains(key, math.inf, "finite")


@pytest.mark.parametrize("key", SHARES)
@pytest.mark.parametrize("value", [1.0, -0.1, math.nan])
def test_shares(key: str, value: float) -> None:
    complains(key, value, "below 1")


@pytest.mark.parametrize("key", ["model.head_dim", "trainer.micro_batch_size", "model.axial_dims"])
def test_null_is_fine_where_it_has_a_meaning(key: str) -> None:
    make(key, None)


def test_there_are_choices() -> None:
    found = {f"{group}.{name}" for group, name, _ in ENUM_FIELDS}
    assert found >= {"model.norm", "trainer.precision", "task.kind"}


@pytest.mark.parametrize(("group", "name", "kind"), ENUM_FIELDS, ids=[name for _, name, _ in ENUM_FIELDS])
def test_a_choice_may_be_given_by_its_name(group: str, name: str, kind: type[Enum]) -> None:
    beside: dict[str, Any] = {"causal": False} if name == "pooling" else {}  # the first token decides
    beside |= {"hosts": ["node1"]} if group == "launcher" else {}
    for member in kind:
        config = make(f"{group}.{name}", member.name, **beside)
        assert getattr(config, name) is member
        assert replace(config) == config
    for value in ("nope", 3, None, member.name.upper()):
        complains(f"{group}.{name}", value, "must be ", f" or {member.name}", **beside)


def test_choices_in_lists() -> None:
    lsh, local = AttentionKind.lsh, AttentionKind.local
    config = ModelConfig(layers=["lsh", local], encoder_layers=("local",))
    assert (config.layers, config.encoder_layers) == ([lsh, local], [local])
    complains("model.layers[1]", "far", "lsh, local or exact", layers=["lsh", "far"])
    complains("model.layers", "'lsh'", "list", layers="lsh")
    complains("model.encoder_layers", lsh, "list", encoder_layers=lsh)
    with pytest.raises(ConfigError, match=r"^model\.norm=nope: .*layer, rms, scale or rezero"):
        ModelConfig(norm="nope")
    with pytest.raises(ConfigError, match=r"model\.cross_attention=local: .*exact or lsh"):
        ModelConfig(cross_attention="local")


def test_a_model_of_strings_is_that_of_the_choices() -> None:
    compat = CompatConfig(merge_streams="concat")
    config = ModelConfig(position="rotary", norm="rezero", activation="glu", compat=compat)
    assert (config.max_positions, config.output_dim, config.norm) == (None, 2 * config.dim, Norm.rezero)
    complains("model.head_dim", 5, "rotary", position="rotary")


def test_numbers_by_type() -> None:
    complains("model.n_hashes", 4.9, "whole number")
    complains("model.dim", "'32'", "whole number", dim="32")
    complains("model.n_layers", True, "whole number")
    complains("model.dim", None, "whole number")
    complains("model.head_dim", 8.0, "whole number")
    complains("model.axial_shape[1]", 1.5, "whole number", axial_shape=[32, 1.5])
    complains("model.dropout", "'0.1'", "number", dropout="0.1")
    complains("optim.betas[0]", "'a'", "number", betas=["a", 0.9])
    complains("model.causal", "'false'", "true or false", causal="false")
    complains("model.causal", 1, "true or false")
    assert OptimConfig(lr=1, betas=(0, 0.9)).betas == [0, 0.9]


def test_every_group_is_checked_when_a_program_makes_it() -> None:
    assert {"launcher", "data", "model", "model.compat"} <= set(GROUPS)
    assert all(issubclass(cls, ConfigGroup) for cls in [*GROUPS.values(), RunConfig])
    assert LauncherConfig(kind="local").kind is LauncherKind.local  # type: ignore[arg-type]
    for group, cls in GROUPS.items():
        if group != "model.compat":
            with pytest.raises(ConfigError, match=rf"^{group}=3: must be a {cls.__name__}"):
                RunConfig(**{group: 3})
    with pytest.raises(ConfigError, match=r"^resume=3: "):
        RunConfig(resume=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^model\.compat=.*: must be a CompatConfig"):
        ModelConfig(compat={"chunk_wrap": True})  # type: ignore[arg-type]


@pytest.mark.parametrize("group", GROUPS)
def test_every_number_has_bounds(group: str) -> None:
    hints = get_type_hints(GROUPS[group])
    for each in fields(GROUPS[group]):
        if hints[each.name] in (int, float, int | None):
            assert "bounds" in each.metadata, f"{group}.{each.name}"
        if hints[each.name] in (int, int | None):
            complains(f"{group}.{each.name}", 2**63, "at most")


@pytest.mark.parametrize("group", GROUPS)
def test_every_number_is_looked_at(group: str) -> None:
    for name, kind in get_type_hints(GROUPS[group]).items():
        if kind not in (int, float, int | None):
            continue
        complains(f"{group}.{name}", "'many'", "number", **{name: "many"})


def test_numbers_of_the_model() -> None:
    complains("model.n_heads", 3, "model.dim=256")
    assert ModelConfig(n_heads=3, head_dim=10).resolved_head_dim == 10
    complains("model.n_buckets", 7, "even")
    complains("model.n_buckets", 0, "at least 1")
    assert ModelConfig(n_buckets=1).n_buckets == 1
    for value in (0.0, -1.0, math.inf, math.nan):
        complains("model.qk_scale", value, "above 0")
    complains("model.layers", [], "lsh")
    complains("model.head_dim", 5, "rotary", position=Position.rotary)


def test_windows_whose_places_have_32_bits() -> None:
    for key in ("model.window", "model.local_window"):
        complains(key, 2**28 + 1, str(2**28))
    assert ModelConfig(window=2**28, local_window=2**28).window == 2**28
    complains("model.window", 2**20 + 1, "model.count_pairs_once", n_buckets=256, count_pairs_once=True)
    assert ModelConfig(window=2**20, n_buckets=256, count_pairs_once=True).window == 2**20


def test_chunks_of_which_all_pairs_are_held() -> None:
    for key in ("model.chunk_len", "model.compat.local_chunk_len"):
        complains(key, 2**14 + 1, str(2**14), "exact")
    assert ModelConfig(chunk_len=2**14, compat=CompatConfig(local_chunk_len=2**14)).chunk_len == 2**14


def test_chunk_rule() -> None:
    chunk = {"neighbours": NeighbourRule.chunk}
    complains("model.compat.chunk_wrap", True, "model.neighbours=chunk")
    complains("model.compat.chunk_wrap", True, "count_pairs_once", count_pairs_once=True, **chunk)
    complains("model.compat.chunk_wrap", True, "local_round", local_round=True, **chunk)
    complains("model.n_chunks_after", 1, "causal", **chunk)
    complains("model.compat.local_chunks_after", 1, "causal", local_chunk_len=8)
    assert ModelConfig(n_chunks_after=1, causal=False, **chunk).n_chunks_after == 1


def test_what_models_of_other_systems_need() -> None:
    for factors in ([8, 6], [64, 1], [-8, -8], []):
        complains("model.compat.bucket_factors", factors, "64", n_buckets=64)
    complains("model.compat.hash_seed", 3, "rotation", hash_scheme=HashScheme.floor)
    complains("model.qk_conv", 1, "from 2 to 8")
    complains("model.qk_conv", 9, "8")
    complains("model.qk_conv", 3, "model.causal=true", causal=False)
    assert ModelConfig(qk_conv=3).encoder().qk_conv == 0
    complains("model.shared_qk", False, "model.neighbours=window", neighbours=NeighbourRule.chunk)
    complains("model.shared_qk", False, "model.compat.hash_seed=3", compat=CompatConfig(hash_seed=3))
    complains("model.shared_qk", False, "bucket_factors=[8, 8]", compat=CompatConfig(bucket_factors=[8, 8]))
    complains("model.qk_scale", 0.5, "model.shared_qk=false", shared_qk=False)
    complains("model.axial_dims", [128, 128], "axial_sum", compat=CompatConfig(axial_sum=True))
    complains("model.tie_embeddings", True, "concat", compat=CompatConfig(merge_streams=StreamMerge.concat))


def test_axial_positions() -> None:
    complains("model.axial_shape", [], "axis")
    complains("model.axial_shape", [0, 64], "positive")
    for dims in ([128], [100, 100], [0, 256]):
        complains("model.axial_dims", dims, "256")
    assert ModelConfig(dim=7, n_heads=7, axial_shape=[4, 4, 4]).resolved_axial_dims == [3, 2, 2]


def test_optimizer() -> None:
    complains("optim.betas", [0.9], "two")
    for betas in ([0.9, 1.0], [-0.1, 0.9], [math.nan, 0.9]):
        complains("optim.betas", betas, "below 1")
    for value in (-0.1, 1.1, math.nan):
        complains("optim.min_lr_ratio", value, "at least 0 and at most 1")


def test_zero() -> None:
    complains("deepspeed.stage", 4, "at least 0 and at most 3")
    complains("deepspeed.offload_optimizer", True, "deepspeed.stage")
    assert DeepSpeedConfig(stage=1, offload_optimizer=True).offload_optimizer


@pytest.mark.parametrize(
    ("model", "longest"),
    [({"axial_shape": [4, 8]}, 32), ({"position": Position.learned, "max_seq_len": 40}, 40)],
)
def test_rows_longer_than_positions(model: dict[str, Any], longest: int) -> None:
    RunConfig(model=ModelConfig(**model), data=DataConfig(seq_len=longest))
    with pytest.raises(ConfigError, match=rf"data\.seq_len={longest + 1}: .*\b{longest}\b"):
        RunConfig(model=ModelConfig(**model), data=DataConfig(seq_len=longest + 1))


@pytest.mark.parametrize("position", [Position.rotary, Position.sinusoidal])
def test_positions_without_an_end(position: Position) -> None:
    assert ModelConfig(position=position).max_positions is None
    RunConfig(model=ModelConfig(position=position), data=DataConfig(seq_len=10**6))


def test_shared_layers_exclude_stage_3() -> None:
    model = ModelConfig(share_layers=True)
    RunConfig(model=model, deepspeed=DeepSpeedConfig(stage=2))
    with pytest.raises(ConfigError, match=r"model\.share_layers=true: .*deepspeed\.stage=3"):
        RunConfig(model=model, deepspeed=DeepSpeedConfig(stage=3))


@pytest.mark.parametrize("key", ["output_dir", "resume"])
def test_empty_paths(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}=''"):
        RunConfig(**{key: ""})


def test_two_sided_models_are_not_trained() -> None:
    with pytest.raises(ConfigError, match=r"model\.causal=False"):
        RunConfig(model=ModelConfig(causal=False))


def test_batch_arithmetic() -> None:
    config = RunConfig(data=DataConfig(batch_size=12), trainer=TrainerConfig(micro_batch_size=2))
    assert config.micro_batching(1) == (2, 6)
    assert config.micro_batching(3) == (2, 2)
    assert RunConfig(data=DataConfig(batch_size=12)).micro_batching(3) == (4, 1)
    with pytest.raises(ConfigError, match=r"data\.batch_size=12: .*\b5\b"):
        config.micro_batching(5)
    with pytest.raises(ConfigError, match=r"trainer\.micro_batch_size=2: .*\b3\b"):
        config.micro_batching(4)


def test_layers_repeat() -> None:
    lsh, local = AttentionKind.lsh, AttentionKind.local
    assert ModelConfig(n_layers=5, layers=[local, local, lsh]).layer_kinds() == [local, local, lsh, local, local]


def test_fp16_needs_a_gpu_and_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(stage: int) -> dict[str, Any]:
        return deepspeed_dict(DeepSpeedConfig(stage=stage), OptimConfig(), Precision.fp16, 1, 1)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"trainer\.precision=fp16: .*GPU"):
        settings(1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"trainer\.precision=fp16: .*deepspeed\.stage"):
        settings(0)
    assert settings(1)["fp16"] == {"enabled": True}


def test_configuration_errors_are_what_users_and_python_expect() -> None:
    assert issubclass(ConfigError, UserError)
    assert issubclass(ConfigError, ValueError)
    assert Activation("glu") is Activation.glu


@pytest.mark.parametrize("path", ["", [], ["a", ""], 3, ["a", 4], None, {"a": "b"}])
def test_data_paths(path: object) -> None:
    complains("data.path", path, "list")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("inf")], [1.0, float("nan")]])
def test_data_weights(weights: list[float]) -> None:
    complains("data.weights", weights, "2 numbers", path=["a", "b"])


def test_epochs_are_of_pooled_data() -> None:
    complains("data.epochs", 2, "trainer.max_steps", path=["a", "b"], weights=[1.0, 2.0])
    assert DataConfig(path=["a", "b"], epochs=2).paths() == ["a", "b"]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_damaged_share(share: float) -> None:
    complains("data.max_damaged_fraction", share, "below 1")


def test_cache_size() -> None:
    complains("data.cache_gb", 0.0, "above 0")
    complains("data.cache_dir", "")
