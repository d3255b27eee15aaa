"""What a launcher tells a rank: where it is incomplete or wrong, the rank says so before it waits for others."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from reformer_dist.distributed import runtime
from reformer_dist.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2: .*MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE=2: .* MASTER_PORT"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "WORLD_SIZE=2: .* RANK"),
        ({"RANK": "1"}, "RANK=1: .*WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: .*WORLD_SIZE=2"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK=first: .*whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: .*whole number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: .*whole number"),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], message: str
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        runtime.start()


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch, used_port: int) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": used_port}.items():
        monkeypatch.setenv(name, str(value))

    def listen(*_: object, **options: object) -> None:
        dist.TCPStore("127.0.0.1", used_port, is_master=True, wait_for_workers=False)

    # the tests have joined a job of their own
    monkeypatch.setattr(dist, "init_process_group", listen)
    with pytest.raises(UserError, match=rf"^MASTER_PORT={used_port}: is in use"):
        runtime._join("gloo", 0, 2, runtime.TIMEOUT)


def test_nccl_records_its_collectives_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    monkeypatch.chdir(tmp_path)
    runtime.record_collectives("outputs/run/nccl_rank_")
    assert [os.environ[name] for name in names] == ["1", "7", str(tmp_path / "outputs/run/nccl_rank_")]
