"""Exit statuses are a contract with schedulers and shells: the numbers themselves, not only their names."""

from __future__ import annotations

from reformer_dist.process import exit_status


def test_numbers() -> None:
    assert exit_status.PREEMPTED == 75  # EX_TEMPFAIL: start the same command again
    assert exit_status.INTERRUPTED == 130  # 128 + SIGINT
    assert exit_status.BROKEN_PIPE == 141  # 128 + SIGPIPE
