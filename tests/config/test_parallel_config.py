"""Every check of how ranks share sequences names the key, the value and what would be right."""

from __future__ import annotations

import math
from typing import Any

import pytest

from reformer_dist.config import (
    AttentionKind,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainerConfig,
)
from reformer_dist.errors import ConfigError


def run(n_heads: int = 4, layers: list[AttentionKind] | None = None, **parallel: Any) -> RunConfig:
    model = ModelConfig(n_heads=n_heads, head_dim=8, **({} if layers is None else {"layers": layers}))
    return RunConfig(
        model=model,
        data=DataConfig(batch_size=12),
        trainer=TrainerConfig(micro_batch_size=2),
        parallel=ParallelConfig(**parallel),
    )


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("key", ["sequence", "heads", "buckets"])
def test_too_few_ranks(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^parallel\.{key}={value}: .*\b1\b"):
        ParallelConfig(**{key: value})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_timeout(value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^parallel\.timeout={value}: "):
        ParallelConfig(timeout=value)


@pytest.mark.parametrize(("key", "sequence", "value"), [("heads", 4, 3), ("buckets", 4, 8), ("heads", 1, 2)])
def test_ranks_that_do_not_divide(key: str, sequence: int, value: int) -> None:
    right = rf"^parallel\.{key}={value}: .*parallel\.sequence={sequence}"
    with pytest.raises(ConfigError, match=right):
        ParallelConfig(sequence=sequence, **{key: value})


@pytest.mark.parametrize(("heads", "buckets"), [(2, 2), (8, 8), (1, 4), (8, 2)])
def test_a_product_that_is_not_the_whole(heads: int, buckets: int) -> None:
    right = rf"^parallel\.buckets={buckets}: .*parallel\.heads={heads}\b.*parallel\.sequence=8"
    with pytest.raises(ConfigError, match=right):
        ParallelConfig(sequence=8, heads=heads, buckets=buckets)


def test_the_meshes_that_are_left() -> None:
    assert ParallelConfig().meshes() == [(1, 1)]
    assert ParallelConfig(sequence=6).meshes() == [(6, 1), (3, 2), (2, 3), (1, 6)]
    assert ParallelConfig(sequence=6, heads=2).meshes() == [(2, 3)]
    assert ParallelConfig(sequence=6, buckets=6).meshes() == [(1, 6)]
    assert ParallelConfig(sequence=6, heads=3, buckets=2).meshes() == [(3, 2)]


@pytest.mark.parametrize(
    "asked", [{"heads": 3}, {"buckets": 1}, {"heads": 3, "buckets": 1}], ids=lambda asked: " ".join(asked)
)
def test_heads_that_do_not_divide_the_layers(asked: dict[str, int]) -> None:
    heads, buckets = asked.get("heads"), asked.get("buckets")
    right = rf"^parallel\.heads={heads}, parallel\.buckets={buckets}: .*model\.n_heads=4"
    with pytest.raises(ConfigError, match=right):
        run(sequence=3, **asked)
    run(sequence=3)  # buckets are left
    run(n_heads=6, sequence=3, **asked)


@pytest.mark.parametrize("sequence", [3, 8])
def test_exact_layers_share_heads_alone(sequence: int) -> None:
    lsh, exact = AttentionKind.lsh, AttentionKind.exact
    words = rf"^parallel\.sequence={sequence}: .*model\.n_heads=4\b.*exact"
    with pytest.raises(ConfigError, match=words):
        run(layers=[lsh, exact], sequence=sequence)
    run(layers=[lsh], sequence=sequence)
    run(layers=[lsh, exact], sequence=4, buckets=4)
    run(n_heads=24, layers=[exact], sequence=sequence)


@pytest.mark.parametrize(("world_size", "near"), [(1, "1"), (2, "2"), (6, "3 or 6")])
def test_a_world_that_is_no_multiple(world_size: int, near: str) -> None:
    config = run(sequence=4)
    right = rf"^parallel\.sequence=4: .*\b{world_size} ranks.*\b{near}\b"
    right += r".*launcher\.nproc_per_node=4" if world_size == 1 else ""
    for action in (config.dp_size, config.micro_batching):
        with pytest.raises(ConfigError, match=right):
            action(world_size)


@pytest.mark.parametrize(
    ("sequence", "world_size", "dp_size"), [(1, 1, 1), (1, 3, 3), (4, 4, 1), (4, 12, 3), (2, 4, 2)]
)
def test_ranks_of_a_sequence_are_one_for_the_batch(sequence: int, world_size: int, dp_size: int) -> None:
    """Micro-batches are counted as in a job of world_size / parallel.sequence ranks."""
    config = run(sequence=sequence)
    assert config.dp_size(world_size) == dp_size
    assert config.micro_batching(world_size) == run().micro_batching(dp_size) == (2, 6 // dp_size)


@pytest.mark.parametrize("sequence", [1, 2])
def test_the_same_command_on_the_ranks_that_are_left(sequence: int) -> None:
    """Wherever the batch divides, ranks take more micro-batches; elsewhere, it is said how many ranks would do."""
    config = run(sequence=sequence)
    for dp_size, n_micro in ((6, 1), (3, 2), (2, 3), (1, 6)):
        assert config.micro_batching(dp_size * sequence) == (2, n_micro)
    for dp_size, near in ((5, "4 or 6"), (7, "6 or 12"), (8, "6 or 12"), (13, "12")):
        right = rf"^data\.batch_size=12: .*\b{dp_size} data-parallel ranks.*\b{near}\b"
        with pytest.raises(ConfigError, match=right):
            config.micro_batching(dp_size * sequence)
    right = r"^trainer\.micro_batch_size=2: .*\b3\b.*\b1 or 3\b"
    with pytest.raises(ConfigError, match=right):
        config.micro_batching(4 * sequence)
