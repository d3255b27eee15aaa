"""Sweep requests without running any process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reformer_dist.sweep.request import SweepRequest, run_or_sweep


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., SweepRequest]:
    """Parses a `reformer-train` command line into a sweep request with the folder tmp_path/sweep."""

    def ask(*words: str) -> SweepRequest:
        requests: list[SweepRequest] = []
        given = [f"output_dir={tmp_path / 'sweep'}", *words]
        monkeypatch.setattr("sys.argv", ["reformer-train", *given])
        run_or_sweep(lambda config: None, requests.append)
        assert len(requests) == 1, "no sweep"
        return requests[0]

    return ask
