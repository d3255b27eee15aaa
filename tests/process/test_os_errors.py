"""An operating system's error is one line with the path and the reason, without a number or a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.threads import on_ranks

from reformer_dist.distributed.runtime import Runtime
from reformer_dist.process.command import run_command


def test_of_a_command(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reformer_dist.process.log.configure", lambda: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: (tmp_path / "missing").read_text() and None)
    assert end.value.code == 1
    assert capfd.readouterr().err == f"error: {tmp_path}/missing: No such file or directory\n"


def test_of_a_rank(tmp_path: Path) -> None:
    def read(runtime: Runtime) -> None:
        runtime.together(lambda: (tmp_path / "missing").read_text() if runtime.rank == 1 else None)

    errors = on_ranks(2, read)
    assert [str(error) for error in errors] == [f"rank 1: {tmp_path}/missing: No such file or directory"] * 2
