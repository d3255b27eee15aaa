"""launcher=local of commands other than reformer-train; any other is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from reformer_dist.errors import ConfigError
from reformer_dist.inference.predictor import load_predictor
from reformer_dist.launch.choice import take_local_launcher


def test_a_local_launcher_and_the_other_overrides() -> None:
    overrides = ["model.n_hashes=8", "launcher=local", "launcher.nproc_per_node=2"]
    launcher, rest = take_local_launcher("reformer-evaluate", overrides)
    assert launcher is not None and launcher.nproc_per_node == 2
    assert rest == ["model.n_hashes=8"]
    assert take_local_launcher("reformer-evaluate", ["launcher=none", "a.b=1"]) == (None, ["a.b=1"])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["launcher=slurm"], "launcher=slurm"),
        (["launcher.nproc_per_node=2"], "launcher.nproc_per_node=2"),
        (["launcher=local", "launcher.nproc=2"], "nproc"),
        (["launcher=local", "launcher.nproc_per_node=0"], "nproc_per_node=0"),
        (["launcher=local", "launcher.nproc_per_node=two"], "two"),
    ],
)
def test_what_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        take_local_launcher("reformer-evaluate", overrides)


def test_one_process_loads_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="launcher=local: has no effect"):
        load_predictor(tmp_path, ["launcher=local"], None, average=False, best=False)
