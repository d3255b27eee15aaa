"""Jobs that lose a rank: every other rank ends soon, with status 1 and one message that names the lost one.

One script runs all the jobs side by side (failing_ranks.py), and kills what has not ended in a fraction of the
time that a collective would wait; the tests look at what each rank left.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launch import run_ranks

from reformer_dist.distributed import failures
from reformer_dist.distributed.failures import RankReport, RankStatus, _inspect_thread, _is_closed, explain_failure

pytestmark = pytest.mark.jobs

TIMEOUT = 6  # seconds of the jobs that wait for it
LONG = 300  # of those that do not
GONE = "exited without an error, or does not respond"
# torch says so now and then on a busy machine, when a connection is made
CHATTER = r"\[c10d\] The hostname of the client socket cannot be retrieved"
# name: fate, its rank, number of ranks, time-out
PLAN: dict[str, tuple[str, int, int, float]] = {
    # rank 0 has no pipe to rank 2 in a ring of four: gloo tells it nothing
    "killed": ("killed", 2, 4, LONG),
    "killed host": ("killed", 0, 3, LONG),
    "raises": ("raises", 2, 4, LONG),
    "raising host": ("raises", 0, 3, LONG),
    "complains": ("complains", 1, 2, LONG),
    "hangs": ("hangs", 1, 3, TIMEOUT),
    "hanging host": ("hangs", 0, 2, TIMEOUT),
    # the pair of the hanging rank waits for it, the others in a group with a longer time-out
    "hangs apart": ("hangs", 3, 4, TIMEOUT),
    "frozen host": ("freezes", 0, 2, TIMEOUT),
    "agreed": ("agreed", 1, 3, LONG),
    "none": ("none", 0, 3, LONG),
}
HANGS = r"hangs at failing_ranks\.py:\d+ in hangs: the others waited for it in a collective"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each job left, by name."""
    folder = tmp_path_factory.mktemp("doomed")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    run_ranks(Path(__file__).with_name("failing_ranks.py"), 1, [folder / "plan.json", folder / "found.json"])
    jobs = json.loads((folder / "found.json").read_text())
    for left in (rank for ranks in jobs.values() for rank in ranks):
        lines = left["output"].splitlines(keepends=True)
        left["output"] = "".join(line for line in lines if not re.search(CHATTER, line))
    return jobs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("killed", f"rank 2 of 4 was lost: {GONE}"),
        ("killed host", f"rank 0 of 3, which hosts the job's store, was lost: {GONE}"),
        ("raises", "rank 2 of 4 failed: ValueError: a bad number: 17"),
        ("raising host", "rank 0 of 3 failed: ValueError: a bad number: 17"),
        ("complains", "rank 1 of 2 failed: DataError: shard 3: found by one rank alone"),
        ("hangs", f"rank 1 of 3 {HANGS}"),
        ("hangs apart", f"rank 3 of 4 {HANGS}"),
        ("hanging host", f"rank 0 of 2 {HANGS}"),
        ("frozen host", f"rank 0 of 2, which hosts the job's store, was lost: {GONE}"),
    ],
)
def test_every_other_rank_names_the_lost_one(found, name, words):
    culprit = PLAN[name][1]
    for rank, left in enumerate(found[name]):
        if rank != culprit:
            assert left["status"] == 1, left
            assert re.search(f"^error: {words}; begin again\n$", left["output"], re.MULTILINE), left["output"]
            # a request that is on its way to the store while its host dies makes torch print a page
            assert left["output"].startswith("error: ") or name == "killed host"
            assert left["output"].count("error: ") == 1


def test_the_end_of_the_host_is_seen_on_an_idle_connection():
    near, far = socket.socketpair()
    with near:
        assert not _is_closed(near)
        far.close()
        assert _is_closed(near)


def test_a_rank_that_waits_for_what_it_sent_is_not_busy():
    here = sys._getframe()
    assert _inspect_thread(3, here).status is RankStatus.busy
    assert re.fullmatch(rf"test_failures.py:\d+ in {here.f_code.co_name}", _inspect_thread(3, here).location)
    names = {"sys": sys}
    exec(compile("def wait():\n return sys._getframe()", failures.__file__, "exec"), names)
    assert _inspect_thread(3, names["wait"]()).status is RankStatus.waiting


def test_the_rank_that_failed_says_it_in_its_own_way(found):
    failed = found["raises"][2]
    assert failed["status"] == 1
    assert "Traceback" in failed["output"] and "ValueError: a bad number: 17" in failed["output"]
    complaint = found["complains"][1]
    assert complaint["status"] == 1
    assert complaint["output"] == "error: shard 3: found by one rank alone\n"


@pytest.mark.parametrize("name", ["hangs", "hangs apart", "hanging host"])
def test_a_rank_that_hangs_is_ended_too(found, name):
    assert found[name][PLAN[name][1]]["status"] == 1


def test_an_error_that_all_agreed_on_is_no_loss(found):
    assert [(left["status"], left["output"]) for left in found["agreed"]] == [
        (1, "error: rank 1: no data\n"),
        (1, ""),
        (1, ""),
    ]


def test_a_job_that_ends_well_says_nothing(found):
    assert [(left["status"], left["output"]) for left in found["none"]] == [(0, "")] * 3


def collective_error(rank: int, words: str = "RuntimeError: Connection closed by peer") -> RankReport:
    return RankReport(rank, RankStatus.collective_error, words, f"trainer.py:{rank} in fit")


def test_a_rank_that_noticed_or_waits_is_not_lost():
    reports = {
        0: collective_error(0),
        1: RankReport(1, RankStatus.waiting, location="x.py:1 in f"),
        3: collective_error(3),
    }
    assert explain_failure(reports, 4) == f"rank 2 of 4 was lost: {GONE}"
    assert explain_failure(reports, 6).startswith("ranks 2, 4, 5 of 6 were lost: ")


def test_failed_ranks_come_before_silent_ones():
    reports = {0: collective_error(0), 1: RankReport(1, RankStatus.failed, "MemoryError")}
    assert explain_failure(reports, 3) == f"rank 1 of 3 failed: MemoryError; rank 2 of 3 was lost: {GONE}"


def test_only_a_time_out_makes_a_busy_rank_a_hanging_one():
    busy = RankReport(1, RankStatus.busy, location="x.py:1 in f")
    late = collective_error(0, "RuntimeError: Timed out waiting 5000ms for recv operation to complete")
    assert explain_failure({0: late, 1: busy}, 2).startswith("rank 1 of 2 hangs at x.py:1 in f: ")
    message = explain_failure({0: collective_error(0), 1: busy}, 2)
    assert message.startswith(
        "all 2 ranks are alive, but a collective failed among them: rank 0 at trainer.py:0 in fit"
    )
