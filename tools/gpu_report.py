#!/usr/bin/env python3
"""GPU report in under 9 minutes: correctness and speed of the kernels, and the longest sequence on one GPU.

rates      measured peak rates of the GPU: bytes per second of a copy, FLOP/s of a matrix product
attention  forward and backward, compared with PyTorch's exact kernels and FlexAttention (rows of
           bench_attention.py), and the roofline time at the measured rates as a fraction of the measured time
training   steps of a 12-layer model of width 1024 at increasing lengths, until one does not fit (rows of
           bench_step.py), with peak memory and the estimate of reformer_dist/planning
tests      the kernel tests and those marked `cuda`, on this device

Writes report.json, report.md and, if matplotlib is installed, plots. Each section has a time budget, and unused
time goes to the next one; the report lists what was skipped. Benchmark rows check their results first. If a test
fails, report.md shows no speed; if time runs out before one fails, it shows how many passed. Exits 1 if a result
was incorrect. --small runs every section at toy sizes on any device, only to test the tool.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from attention_cases import EXACT, BenchCase
from bench_attention import plot, result_row
from child_process import ChildProcess

ROOT = Path(__file__).resolve().parents[1]
# Seconds, in order. Tests come last: they compile most and can use all remaining time, and benchmark rows check
# themselves.
BUDGETS = {"rates": 20, "attention": 220, "training": 120, "tests": 150}
SPEEDS = ("attention", "training")
ROW_TIMEOUT = 90  # seconds for a row of attention
OUT_OF_TIME = "out of time"
SOME_TESTS = ["tests/kernels/test_hash_kernel.py", "-k", "one_bucket"]
# ahead-of-time compilation for machines without a GPU, and the tests of this tool
IGNORED = ("--ignore=tests/kernels/test_compile.py", "--ignore=tests/tools/test_gpu_report.py")
# a line of pytest about one test, with or without xdist, or in the summary
TEST_LINE = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] )?(?:([A-Z]+) )?(tests/.+?::.+?)(?: ([A-Z]+))?(?: +\[ *\d+%\]| - .*)?"
)
FLEX_LENGTHS = (2**14, 2**16)
MAX_FLASH_LENGTH = 2**16
MAX_REPEATED_LENGTH = 2**18  # longer rows of exact kernels run once


@dataclass
class Section:
    """Results of a section of the report, and notes on what was skipped."""

    name: str
    deadline: float
    """By time.monotonic()."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def is_out_of_time(self) -> bool:
        return self.seconds_left < 5  # too little to start anything

    def row(self, label: str, command: list[str]) -> dict[str, Any] | None:
        """Runs a command and returns the JSON of its last line; None, with a note, if there is none in time."""
        if self.is_out_of_time:
            self.notes.append(f"{label}: skipped, {OUT_OF_TIME}")
            return None
        with ChildProcess(command, ROOT) as child:
            printed = list(child.lines(lambda: self.seconds_left))
            failure = f"killed, {OUT_OF_TIME}" if child.timed_out else child.failure
        row = json.loads(printed[-1]) if printed and is_row(printed[-1]) and not child.timed_out else {}
        if "correct" not in row or "error" in row:
            self.notes.append(f"{label}: {row.get('error', failure)}")
            return None
        self.rows.append(row)
        return row


def is_row(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


RunSection = Callable[[str, bool, dict[str, Any], float], Section]


def main() -> int:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.small:
        sys.exit("gpu_report.py: no CUDA device; use --small to test the tool on a CPU")
    # as an exception, so that child processes in their own sessions are killed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = (
        arguments.output or ROOT / "docs" / "benchmarks" / f"{datetime.date.today()}-{slug(device_name(device))}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "card": device_name(device),
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "small": arguments.small,
    }
    deadline = time.monotonic()
    for name in BUDGETS:
        print(f"{name} ...", flush=True)
        deadline += BUDGETS[name]
        section = run_section(name, device, arguments.small, report, deadline)
        report[name] = {"rows": section.rows, "notes": section.notes}
        write(report, folder)  # after each section, so that no result is lost
    if not tests_failed(report):
        draw(report, folder)
    print(f"written to {folder}")
    return exit_status(report)


def run_section(name: str, device: str, small: bool, report: dict[str, Any], deadline: float) -> Section:
    """Runs a section; an exception becomes a note, so that the others still run."""
    sections: dict[str, RunSection] = {
        "rates": rates,
        "attention": attention,
        "training": training,
        "tests": tests,
    }
    try:
        return sections[name](device, small, report, deadline)
    except Exception as error:
        return Section(name, deadline, notes=[f"failed with {type(error).__name__}: {error}"])
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()  # leaves the GPU's memory to the processes of the other sections


def tests_failed(report: dict[str, Any]) -> bool:
    """Whether a test failed; False if they were killed or could not start."""
    return any(row["result"] == "failed" for row in report.get("tests", {"rows": []})["rows"])


def exit_status(report: dict[str, Any]) -> int:
    """1 if a result was incorrect, else 0, also if something could not run."""
    is_incorrect = any(row["correct"] is False for name in SPEEDS for row in report[name]["rows"])
    return 1 if is_incorrect or tests_failed(report) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder (default: docs/benchmarks/<date>-<card>)")
    parser.add_argument("--small", action="store_true", help="toy sizes, to test the tool on any device")
    return parser.parse_args()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def rates(device: str, small: bool, report: dict[str, Any], deadline: float) -> Section:
    """Bytes per second of a copy (reads and writes) and FLOP/s of a bf16 matrix product."""
    section = Section("rates", deadline)
    size, dtype = (2**9, torch.float32) if small else (2**13, torch.bfloat16)
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    source = torch.ones(2**20 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy, product = (
        best_seconds(device, lambda: target.copy_(source)),
        best_seconds(device, lambda: torch.mm(a, b, out=c)),
    )
    section.rows = [{"bytes_per_s": 2 * source.numel() / copy, "flops_per_s": 2 * size**3 / product}]
    return section


def best_seconds(device: str, work: Callable[[], Any]) -> float:
    """Seconds per call, the best of 10 batches of 5."""
    times = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            work()
        synchronize(device)
        times.append((time.perf_counter() - start) / 5)
    return min(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def attention(device: str, small: bool, report: dict[str, Any], deadline: float) -> Section:
    section = Section("attention", deadline)
    cases = attention_cases(device, small)
    while len(section.rows) < len(cases) and not section.is_out_of_time:
        measure_rows(section, cases[len(section.rows) :], report["rates"]["rows"])
    section.notes += [f"{label(row)}: skipped, {OUT_OF_TIME}" for row in cases[len(section.rows) :]]
    compare(section.rows)
    return section


def measure_rows(section: Section, cases: list[BenchCase], measured: list[dict[str, float]]) -> None:
    """Measures rows in one process until one crashes it: that row gets an error, the next a new process."""
    tool, rows = Path(__file__).with_name("bench_attention.py"), iter(cases)
    n_before = len(section.rows)
    with ChildProcess(
        [sys.executable, str(tool), "--rows", json.dumps([asdict(row) for row in cases])], ROOT
    ) as child:
        for line in child.lines(lambda: min(ROW_TIMEOUT, section.seconds_left)):
            if is_row(line):
                row, result = next(rows), json.loads(line)
                if row.impl == "ours" and result["correct"] and measured:
                    seconds = result["replayed"] or result["seconds"]
                    result.update(roofline(row, measured[0], seconds, result["keys"]))
                section.rows.append(result)
        failure = f"killed after {ROW_TIMEOUT} s without output" if child.timed_out else child.failure
    if section.seconds_left <= 0:
        failure = f"killed, {OUT_OF_TIME}"
    # a process that lost the device exits with status 0 after the row that lost it
    row = next(rows, None)
    if row is not None and (failure is not None or len(section.rows) == n_before):
        section.rows.append(result_row(row, None, failure or "printed nothing"))


def attention_cases(device: str, small: bool) -> list[BenchCase]:
    """Ours and the fastest exact kernel by length, then the others, then rows that take half a minute each."""
    lengths = [256] if small else [2**12, 2**14, 2**16, 2**18, 2**20]
    sizes = [(seq_len, head_dim) for seq_len in lengths for head_dim in ([16] if small else [64, 128])]
    exact = "sdpa" if device == "cpu" else "cudnn"
    entries = [(*size, *entry) for size in sizes for entry in (("ours", 4), ("ours", 8), (exact, 8))]
    entries += [] if small else [(*size, "flash", 8) for size in sizes if size[0] <= MAX_FLASH_LENGTH]
    entries += [] if small else [(*size, "flex", 4) for size in sizes if size[0] in FLEX_LENGTHS]
    entries.sort(key=lambda entry: is_slow(entry[2], entry[0]))
    return [
        BenchCase(
            impl=impl,
            seq_len=seq_len,
            n_hashes=n_hashes,
            heads=2 if small else 16,
            head_dim=head_dim,
            window=64,
            n_buckets=None,
            dtype="float32" if small else "bfloat16",
            device=device,
            repeat=1 if is_slow(impl, seq_len) else 5,
            threads=2,
        )
        for seq_len, head_dim, impl, n_hashes in entries
    ]


def is_slow(impl: str, seq_len: int) -> bool:
    return impl in EXACT and seq_len > MAX_REPEATED_LENGTH


def label(row: BenchCase) -> str:
    return f"{row.impl}, {row.seq_len} tokens, heads of {row.head_dim}, {row.n_hashes} rounds"


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds the speedup over the fastest exact kernel at the same sizes, both without host overhead."""

    def seconds(row: dict[str, Any]) -> float:
        return float(row["replayed"] or row["seconds"])

    for row in (row for row in rows if row["impl"] == "ours" and row["correct"]):
        same = [each for each in rows if all(each[key] == row[key] for key in ("seq_len", "head_dim"))]
        exact = [seconds(each) for each in same if each["impl"] in EXACT and each["correct"]]
        if exact:
            row["times_faster_than_exact"] = round(min(exact) / seconds(row), 2)


def roofline(row: BenchCase, measured: dict[str, float], seconds: float, keys: float) -> dict[str, float]:
    """FLOPs and bytes of a row, and its roofline time at the measured rates as a fraction of its time.

    keys: mean number of keys per token and round. Forward has 2 products of head_dim per pair, backward 5. Bytes
    are the minimum reads and writes: q, v, out in forward; q, v, out, dO, dq, dv in backward; and the bucket ids.
    """
    flops = 7 * 2 * row.heads * row.seq_len * row.n_hashes * keys * row.head_dim
    width = getattr(torch, row.dtype).itemsize * row.head_dim
    n_bytes = row.heads * row.seq_len * (9 * width + 2 * row.n_hashes * 2)
    roofline_seconds = max(flops / measured["flops_per_s"], n_bytes / measured["bytes_per_s"])
    return {"flops": flops, "bytes": n_bytes, "roofline_share": round(roofline_seconds / seconds, 4)}


def training(device: str, small: bool, report: dict[str, Any], deadline: float) -> Section:
    section = Section("training", deadline)
    for seq_len in [128] if small else [2**14, 2**18, 2**20]:
        tool = str(Path(__file__).with_name("bench_step.py"))
        command = [sys.executable, tool, "--json", "--repeat", "2", *training_overrides(seq_len, small)]
        row = section.row(f"{seq_len} tokens", command)
        if row is None:
            break
        section.rows[-1] = {"seq_len": seq_len, **flatten_row(row)}
    return section


def training_overrides(seq_len: int, small: bool) -> list[str]:
    """Arguments of bench_step.py: model, length and precision."""
    sizes = [
        f"data.seq_len={seq_len}",
        "model.axial_shape=[1024,1024]",
        f"model.n_buckets={max(2, seq_len // 64)}",
    ]
    if small:
        return [*sizes, "model.dim=32", "model.n_layers=2", "model.n_heads=2"]
    model = ["model.dim=1024", "model.n_layers=12", "model.n_heads=16", "model.n_hashes=4", "model.ff_chunk=16384"]
    return [*sizes, *model, "trainer.precision=bf16"]


def flatten_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of bench_step.py with its split as text; an incorrect row has none."""
    split = row.pop("split", {})
    total = sum(split.values())
    return {**row, "split": ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in split.items())}


def tests(device: str, small: bool, report: dict[str, Any], deadline: float) -> Section:
    section = Section("tests", deadline)
    selected = SOME_TESTS if small else ["tests/kernels", "tests/cuda", *IGNORED]
    command = [sys.executable, "-m", "pytest", "-vv", "--no-header", "-p", "no:cacheprovider", *selected]
    if importlib.util.find_spec("xdist") is not None and not small:
        command += ["-n", "auto"]  # most of the time is spent compiling
    with ChildProcess(command, ROOT) as child:
        printed = list(child.lines(lambda: section.seconds_left))
        failure = f"killed, {OUT_OF_TIME}" if child.timed_out else child.failure
    verdicts = verdicts_of(printed)
    counts = {word.lower(): sum(verdict == word for verdict in verdicts.values()) for word in ("PASSED", "FAILED")}
    result = "failed" if counts["failed"] else "passed" if failure is None else "not finished"
    section.rows = [{"result": result, **counts}]
    section.notes = [f"{word} {test}" for test, word in verdicts.items() if word in ("FAILED", "ERROR")]
    if result == "not finished":
        section.notes.append(f"{failure}; pytest's last line: {printed[-1] if printed else 'none'}")
    return section


def verdicts_of(printed: list[str]) -> dict[str, str]:
    """PASSED, FAILED, ERROR or SKIPPED by test, from pytest's output so far; the last line of a test wins."""
    verdicts = {}
    for line in printed:
        match = TEST_LINE.fullmatch(line.rstrip())
        if match and (match[1] or match[3]):
            verdicts[match[2]] = match[1] or match[3]
    return verdicts


def write(report: dict[str, Any], folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# {report['card']}, {report['date']}",
        "",
        f"PyTorch {report['torch']}. `python tools/gpu_report.py`.",
    ]
    if report["small"]:
        lines += ["", "Toy sizes (`--small`): these numbers only show that the tool works."]
    if "tests" not in report:
        lines += [
            "",
            "Written before the tests ran: each benchmark row was only checked by itself.",
        ]
    for name in (name for name in BUDGETS if name in report):
        rows, notes = report[name]["rows"], report[name]["notes"]
        if name in SPEEDS and tests_failed(report):
            rows, notes = (
                [],
                ["not shown because tests failed (see report.json)"],
            )
        lines += ["", f"## {name.capitalize()}", "", *table(rows)]
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells_by_row = [[f"{row.get(name, '-')}" for name in names] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *cells_by_row]] if rows else []


def draw(report: dict[str, Any], folder: Path) -> None:
    """Plots seconds over length for each head dimension."""
    rows = [row for row in report.get("attention", {}).get("rows", []) if row["correct"]]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    for head_dim in {row["head_dim"] for row in rows}:
        plot([row for row in rows if row["head_dim"] == head_dim], folder / f"attention-{head_dim}.png")


if __name__ == "__main__":
    sys.exit(main())
