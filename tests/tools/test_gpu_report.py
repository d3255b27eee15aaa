"""The GPU report: every section runs at toy sizes on any device, and no speed is shown after a failed check."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import gpu_report  # noqa: E402
from child_process import ChildProcess  # noqa: E402

RATES = {"rows": [{"bytes_per_s": 1e12, "flops_per_s": 1e14}], "notes": []}


def soon(seconds: float = 60) -> float:
    """The deadline of a section that has `seconds` left."""
    return time.monotonic() + seconds


@pytest.mark.slow
def test_every_section_at_toy_sizes(tmp_path):
    command = [sys.executable, TOOLS / "gpu_report.py", "--small", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    (tests,) = report["tests"]["rows"]
    assert tests["result"] == "passed" and tests["passed"] > 0 and tests["failed"] == 0
    assert all(not report[name]["notes"] for name in gpu_report.BUDGETS)
    assert [row["impl"] for row in report["attention"]["rows"]] == ["ours", "ours", "sdpa"]
    assert 0 < report["attention"]["rows"][0]["roofline_share"] < 1
    (step,) = report["training"]["rows"]
    assert step["tokens_per_s"] > 0 and step["planned_mib"] > 0 and "optimizer" in step["split"]
    page = (tmp_path / "report.md").read_text()
    assert "Toy sizes" in page and "before the tests" not in page


def report_of(result: str, *verdicts: bool | None) -> dict[str, Any]:
    """A report with the given test result and verdicts of attention rows."""
    rows = [{"impl": "ours", "seconds": 0.125, "correct": verdict} for verdict in verdicts]
    sections = {"rates": RATES, "attention": {"rows": rows, "notes": []}, "training": {"rows": [], "notes": []}}
    tests = {"rows": [{"result": result, "passed": 1, "failed": 0}], "notes": []}
    return {"card": "a card", "date": "today", "torch": "2", "small": False, **sections, "tests": tests}


def test_no_speed_is_shown_after_failed_tests(tmp_path):
    gpu_report.write(report_of("failed", True), tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "0.125" not in page and "not shown because tests failed" in page
    for result in ("passed", "not finished"):
        gpu_report.write(report_of(result, True), tmp_path)
        assert "0.125" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("result", "verdicts", "status"),
    [
        ("passed", [True, None], 0),
        ("not finished", [True], 0),
        ("passed", [None, False], 1),
        ("failed", [True], 1),
    ],
)
def test_only_incorrect_results_are_failures(result, verdicts, status):
    assert gpu_report.exit_status(report_of(result, *verdicts)) == status


def test_a_failing_section_does_not_stop_the_others(monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(gpu_report, "rates", broken)
    section = gpu_report.run_section("rates", "cpu", True, {}, soon())
    assert section.rows == [] and section.notes == ["failed with RuntimeError: no memory"]


def test_a_section_that_takes_too_long_is_killed_with_a_note():
    section = gpu_report.Section("training", soon(6))
    assert section.row("sleep", [sys.executable, "-c", "import time; time.sleep(60)"]) is None
    assert section.row("next", [sys.executable, "-c", "print(1)"]) is None
    assert section.notes == ["sleep: killed, out of time", "next: skipped, out of time"]


def test_a_failing_row_reports_its_error():
    section = gpu_report.Section("training", soon())
    for label, code in (
        ("bad", "raise SystemExit('out of memory')"),
        ("told", """print('{"correct": null, "error": "OutOfMemoryError: 9 GiB"}'); raise SystemExit(2)"""),
    ):
        assert section.row(label, [sys.executable, "-c", code]) is None
    assert section.notes == ["bad: exit status 1: out of memory", "told: OutOfMemoryError: 9 GiB"]


def test_a_wrong_row_stays_in_the_report():
    section = gpu_report.Section("training", soon())
    wrong = """print('{"correct": false}'); raise SystemExit(1)"""
    assert section.row("wrong", [sys.executable, "-c", wrong]) == {"correct": False}
    assert section.rows == [{"correct": False}] and section.notes == []


# a tool that crashes at a row of 13 tokens, and loses its device at a row of 17
FRAGILE = """
import json, os, sys
for row in json.loads(sys.argv[2]):
    if row["seq_len"] == 13:
        sys.exit("killed by row 13")
    lost = {"correct": None, "error": "device lost"} if row["seq_len"] == 17 else {"correct": True}
    sizes = {name: row[name] for name in ("impl", "seq_len", "head_dim", "n_hashes")}
    print(json.dumps({**sizes, "replayed": None, "seconds": 1.0, "keys": 1.0, **lost}))
    if row["seq_len"] == 17:
        break
"""


@pytest.fixture
def fragile(tmp_path, monkeypatch):
    """Replaces bench_attention.py by that tool, with five rows."""
    (tmp_path / "bench_attention.py").write_text(FRAGILE)
    monkeypatch.setattr(gpu_report, "__file__", str(tmp_path / "gpu_report.py"))
    (row, *_) = gpu_report.attention_cases("cpu", True)
    rows = [replace(row, seq_len=seq_len) for seq_len in (11, 13, 17, 19, 13)]
    monkeypatch.setattr(gpu_report, "attention_cases", lambda device, small: rows)


def test_rows_after_one_that_crashes_its_process(fragile):
    section = gpu_report.attention("cpu", True, {"rates": RATES}, soon())
    found = [(row["seq_len"], row["correct"], row.get("error")) for row in section.rows]
    killed = "exit status 1: killed by row 13"
    assert found == [
        (11, True, None),
        (13, None, killed),
        (17, None, "device lost"),
        (19, True, None),
        (13, None, killed),
    ]
    assert section.notes == []


def test_rows_without_time_left_are_noted(fragile):
    section = gpu_report.attention("cpu", True, {"rates": RATES}, soon(0))
    assert section.rows == [] and len(section.notes) == 5 and all("skipped" in note for note in section.notes)


def test_a_hanging_process_is_killed_with_its_descendants(tmp_path):
    inner = (
        f"import os, pathlib, time; pathlib.Path('{tmp_path}/pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    written, patience = tmp_path / "pid", soon()

    def once_written() -> float:
        while not (written.exists() and written.read_text()) and time.monotonic() < patience:
            time.sleep(0.02)
        return 0.1

    with ChildProcess([sys.executable, "-c", outer], tmp_path) as child:
        assert list(child.lines(once_written)) == [] and child.timed_out
        assert child.failure == "exit status -9: no message"
    end = soon(10)  # once killed, it exists until its new parent reaps it
    while is_running(written.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(written.read_text().strip())


def is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_lines_come_while_the_process_runs(tmp_path):
    code = "import time; print('first'); time.sleep(60)"
    with ChildProcess([sys.executable, "-c", code], tmp_path) as child:
        assert next(child.lines(lambda: 30)) == "first" and not child.timed_out


SOME_TESTS = """
import time
def test_right(): pass
def test_next(): {body}
def test_slow(): time.sleep({seconds})
"""


@pytest.mark.parametrize(
    ("body", "seconds", "result", "passed"),
    [
        ("pass", 0, "passed", 3),
        ("assert False", 0, "failed", 2),
        ("pass", 60, "not finished", 2),
        ("assert False", 60, "failed", 1),
        ("syntax error", 0, "not finished", 0),
    ],
)
def test_killed_tests_have_not_failed(body, seconds, result, passed, tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_hash_kernel.py").write_text(SOME_TESTS.format(body=body, seconds=seconds))
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_report, "SOME_TESTS", ["tests/kernels/test_hash_kernel.py"])
    section = gpu_report.tests("cpu", True, {}, soon(6 if seconds else 60))
    (row,) = section.rows
    assert (row["result"], row["passed"]) == (result, passed)
    if row["failed"]:
        assert section.notes == ["FAILED tests/kernels/test_hash_kernel.py::test_next"]
    else:
        assert (result == "passed") == (section.notes == [])


def test_roofline_counts_the_visible_keys():
    row = gpu_report.attention_cases("cpu", True)[0]
    cheap = {"bytes_per_s": 1e30, "flops_per_s": 1e9}
    found = gpu_report.roofline(row, cheap, 1.0, 31.5)
    assert found["flops"] == 7 * 2 * 31.5 * row.heads * row.seq_len * row.n_hashes * row.head_dim
    assert found["roofline_share"] == round(found["flops"] / 1e9, 4)


def test_verdicts_of_several_processes():
    printed = [
        "[gw0] [ 50%] PASSED tests/kernels/test_a.py::test_x[a b] ",
        "[gw1] [100%] FAILED tests/kernels/test_a.py::test_y ",
        "FAILED tests/kernels/test_a.py::test_y - assert 1 == 2",
    ]
    found = gpu_report.verdicts_of(printed)
    assert found == {"tests/kernels/test_a.py::test_x[a b]": "PASSED", "tests/kernels/test_a.py::test_y": "FAILED"}
