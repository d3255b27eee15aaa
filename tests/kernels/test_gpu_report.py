"""The report of a GPU: every section runs at toy sizes anywhere, and no speed is shown after a failed check."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import gpu_report  # noqa: E402


@pytest.mark.slow
def test_every_section_at_toy_sizes(tmp_path):
    command = [sys.executable, TOOLS / "gpu_report.py", "--small", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tests"]["rows"] == [{"passed": True}]
    assert all(not report[name]["notes"] for name in gpu_report.BUDGETS)
    assert [row["impl"] for row in report["attention"]["rows"]] == ["ours", "ours", "sdpa"]
    assert 0 < report["attention"]["rows"][0]["roofline_share"] < 1
    (step,) = report["training"]["rows"]
    assert step["tokens_per_s"] > 0 and step["planned_mib"] > 0 and "optimizer" in step["split"]
    assert "Toy sizes" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("work", [gpu_report.attention, gpu_report.training])
def test_no_speed_after_failed_tests(work):
    section = work("cpu", True, {"tests": {"rows": [{"passed": False}]}})
    assert section.rows == [] and "tests failed" in section.notes[0]


def test_a_section_that_is_too_long_is_cut_with_a_note(monkeypatch):
    section = gpu_report.Section("rates")
    monkeypatch.setitem(gpu_report.BUDGETS, "rates", 6)
    assert section.row("sleep", [sys.executable, "-c", "import time; time.sleep(60)"]) is None
    section.started = time.monotonic() - 6
    assert section.row("next", [sys.executable, "-c", "print(1)"]) is None
    assert section.notes == ["sleep: cut after the section's 6 s", "next: left out, the section's 6 s were spent"]


def test_a_row_that_fails_leaves_its_last_words():
    section = gpu_report.Section("rates")
    assert section.row("bad", [sys.executable, "-c", "raise SystemExit('out of memory')"]) is None
    assert section.notes == ["bad: out of memory"]
