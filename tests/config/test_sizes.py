"""Numbers at their bounds and far beyond: refused at the key, or by the plan before anything is built."""

from __future__ import annotations

import math
import time
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from reformer_dist.config import CompatConfig, RunConfig
from reformer_dist.config.checks import nearest_divisors
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import ConfigError
from reformer_dist.models import ReformerLM
from reformer_dist.run import memory_check
from reformer_dist.run.compose import run_config_from, to_dict

GROUPS = {each.name: type(getattr(RunConfig(), each.name)) for each in fields(RunConfig)}
GROUPS = {name: cls for name, cls in GROUPS.items() if is_dataclass(cls)} | {"model.compat": CompatConfig}


def keys_of(*kinds: object) -> list[tuple[str, str, Any]]:
    """(group, name, bounds) of all numbers of these types."""
    return [
        (group, each.name, each.metadata["bounds"])
        for group, cls in GROUPS.items()
        for each in fields(cls)
        if get_type_hints(cls)[each.name] in kinds
    ]


INTEGERS, FLOATS = keys_of(int, int | None), keys_of(float, float | None)
FAR = (2**63, 2**64, 10**20, 10**400, -1, -(2**63), -(10**30))
SAVED = to_dict(RunConfig())


def refuses(group: str, name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        GROUPS[group](**{name: value})
    assert str(caught.value).startswith(f"{group}.{name}={value}: ")


@pytest.mark.parametrize(("group", "name", "bounds"), INTEGERS, ids=[f"{g}.{n}" for g, n, _ in INTEGERS])
def test_integers(group: str, name: str, bounds: Any) -> None:
    for value in (bounds.least - 1, bounds.most + 1, *FAR):
        refuses(group, name, value)


@pytest.mark.parametrize(("group", "name", "bounds"), FLOATS, ids=[f"{g}.{n}" for g, n, _ in FLOATS])
def test_floats(group: str, name: str, bounds: Any) -> None:
    for value in (math.nan, math.inf, -math.inf, -1.0, -1e300):
        refuses(group, name, value)


@pytest.mark.parametrize("key", ["data.seq_len", "trainer.seed", "model.compat.hash_seed"])
@pytest.mark.parametrize("word", [f"{10**20}", f"-{10**20}", "1" + "0" * 5000, ".inf", "nan", "1e400"])
def test_integers_as_words(key: str, word: str) -> None:
    with pytest.raises(ConfigError):
        run_config_from(SAVED, [f"{key}={word}"])


@pytest.mark.parametrize("word", [".nan", ".inf", "-.inf", "1e400", "-1"])
def test_floats_as_words(word: str) -> None:
    with pytest.raises(ConfigError):
        run_config_from(SAVED, [f"optim.lr={word}"])


@pytest.fixture
def job() -> Runtime:
    return Runtime(0, 0, 1, torch.device("cpu"), None)


class ByteTask:
    """What the check asks of a task: a model, which is only counted on the meta device, and its vocabulary."""

    vocab_size = 257

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def build_model(self) -> nn.Module:
        with torch.device("meta"):
            return ReformerLM(self._config.model, self.vocab_size)


BASE = ["model.position=rotary", "data.batch_size=4", "model.n_layers=2"]


def checked(job: Runtime, *words: str) -> None:
    config = run_config_from(SAVED, [*BASE, *words])
    memory_check.require_memory(config, job, ByteTask(config))  # type: ignore[arg-type]


PLANNED = [key for key in INTEGERS if key[0] in ("model", "model.compat", "data", "parallel", "deepspeed")]


@pytest.mark.parametrize(("group", "name", "bounds"), PLANNED, ids=[f"{g}.{n}" for g, n, _ in PLANNED])
def test_the_plan_survives_the_largest_value(group: str, name: str, bounds: Any, job: Runtime) -> None:
    """It fits, or a message says with numbers that it does not; another key may also exclude the value."""
    if (group, name) == ("model", "n_layers"):
        return  # counting so many layers takes half a minute
    began = time.process_time()
    try:
        checked(job, f"{group}.{name}={bounds.most}")
    except ConfigError as error:
        assert "=" in str(error)
    assert time.process_time() - began < 20  # no loop over the value


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("data.seq_len=1000000000", "data.seq_len=1000000000"),
        ("data.batch_size=2147483647", "data.batch_size=2147483647"),
        ("model.ff_dim=16777216", "model.ff_dim=16777216"),
        ("model.dim=1048576", "model.dim=1048576"),
    ],
)
def test_what_no_machine_holds(word: str, part: str, job: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "machine_memory", lambda device, ranks: 2.0**36)
    with pytest.raises(ConfigError, match=r"GiB per rank .* this machine has 64\.00 GiB") as caught:
        checked(job, word)
    assert part in str(caught.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_that_are_allocated_whole(stage: int, job: Runtime) -> None:
    words = [f"deepspeed.stage={stage}", f"deepspeed.reduce_bucket_size={2**63 - 1}"]
    with pytest.raises(ConfigError, match=rf"^deepspeed\.reduce_bucket_size={2**63 - 1}: must be at most \d+"):
        checked(job, *words)
    checked(job, f"deepspeed.stage={stage}")
    checked(job, words[1])  # stage 0 has none


def test_buckets_hold_float32_also_in_bf16(job: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "machine_memory", lambda device, ranks: 2.0**36)
    words = ["deepspeed.stage=1", "trainer.precision=bf16"]
    checked(job, *words, f"deepspeed.reduce_bucket_size={2**34}")
    with pytest.raises(ConfigError, match=rf"reduce_bucket_size={2**34 + 1}: must be at most {2**34}\b"):
        checked(job, *words, f"deepspeed.reduce_bucket_size={2**34 + 1}")


def test_a_small_run_fits_and_doubt_is_a_warning(
    job: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked(job)
    config = run_config_from(SAVED, BASE)
    spec = memory_check.JobSpec(config, 1, 1, 257, "cpu")
    need = memory_check.plan_memory(spec, ByteTask(config).build_model).total
    monkeypatch.setattr(memory_check, "machine_memory", lambda device, ranks: need / 1.2)
    checked(job)
    monkeypatch.setattr(memory_check, "machine_memory", lambda device, ranks: need / 1.6)
    with pytest.raises(ConfigError):
        checked(job)


def test_divisors_of_large_numbers() -> None:
    assert nearest_divisors(8, 3) == "2 or 4"
    assert nearest_divisors(2**31 - 1, 2) == "1 or 2147483647"
    assert nearest_divisors(6, 7) == "6"
