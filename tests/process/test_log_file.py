"""The log file of a process: what was logged before it was opened, and what follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from reformer_dist.process import log
from reformer_dist.process.log import log_to_file, logger, open_log_file


@pytest.mark.parametrize("rank", [0, 1])
def test_it_has_what_every_rank_logs(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    log.configure()
    path = tmp_path / "rank.log"
    for time in ("before", "after"):
        logger.info(f"{time}: step")
        log_to_file(f"{time}: printed elsewhere")
        open_log_file(path) if time == "before" else None
    logger.error("lost")
    lines = [line.split(" ", 2)[2] for line in path.read_text().splitlines()]
    assert lines == [
        f"{time}: {what}" for time in ("before", "after") for what in ("step", "printed elsewhere")
    ] + ["lost"]
    # other ranks print their errors only
    printed = capsys.readouterr().out.splitlines()
    assert printed == (["before: step", "after: step", "lost"] if rank == 0 else ["lost"])


def test_a_full_disk_does_not_end_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    log.configure()
    open_log_file(Path("/dev/full"))
    for number in range(3):
        logger.info(f"step {number}")
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("step")] == ["step 0", "step 1", "step 2"]
    assert sum("/dev/full: can't be written" in line for line in printed) == 1
