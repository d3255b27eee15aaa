#!/usr/bin/env python3
"""One command, under 9 minutes on a GPU: are the kernels right there, how fast, and how far does one card go?

rates      what the card gives at best here: bytes a second of a copy, operations a second of a matrix product
attention  forward and backward beside PyTorch's exact kernels and FlexAttention (rows of bench_attention.py), with
           the share of the time that the card's rates say the work needs (the roofline)
training   steps of a 12-layer model, 1024 wide, at growing lengths until one does not fit (rows of bench_step.py),
           with their peak memory and what reformer_dist/planning says of it
tests      the tests of the kernels and those marked `cuda`, on this device

Writes report.json, report.md and, where matplotlib is installed, plots. Sections have budgets, and what one leaves
over is the next one's; what is left out of a long one is named in the report, and the rest goes on. Rows of speed
check their results first; where a test fails too, report.md shows no speed, and where none did but time ran out,
it says how many passed. The tool exits 1 if a result was wrong. --small runs every section at toy sizes, also on a
CPU: it shows that the tool works, and nothing else.
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
from bench_attention import plot
from bench_attention import report as attention_row
from child_process import ChildProcess

ROOT = Path(__file__).resolve().parents[1]
# Seconds, in the order of running. Tests come last: they compile most, any time that is left serves them, and rows
# of speed, which check themselves, wait for nothing that may take longer than it should.
BUDGETS = {"rates": 20, "attention": 220, "training": 120, "tests": 150}
SPEEDS = ("attention", "training")
LONGEST_SILENCE = 90  # seconds for a row of attention: what takes longer hangs, and others wait behind it
SPENT = "the section's time was spent"
SOME_TESTS = ["tests/kernels/test_hash_kernel.py", "-k", "one_bucket"]
# compiling for a card, where there is none, and this tool
NOT_HERE = ("--ignore=tests/kernels/test_compile.py", "--ignore=tests/tools/test_gpu_report.py")
# a line of pytest on one test, by itself or by one of several processes, or in the summary
OF_A_TEST = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] )?(?:([A-Z]+) )?(tests/.+?::.+?)(?: ([A-Z]+))?(?: +\[ *\d+%\]| - .*)?"
)
FLEX_LENGTHS = (2**14, 2**16)
LONGEST_FLASH = 2**16
LONGEST_REPEATED = 2**18  # tokens that exact kernels attend more than once


@dataclass
class Section:
    """What a part of the report found, and what it left out."""

    name: str
    ends: float
    """When its time is spent, by time.monotonic()."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    @property
    def is_spent(self) -> bool:
        return self.seconds_left < 5  # in less, nothing starts

    def row(self, label: str, command: list[str]) -> dict[str, Any] | None:
        """The JSON that a process of its own prints last; None, and a note, where it prints none in time."""
        if self.is_spent:
            self.notes.append(f"{label}: left out, {SPENT}")
            return None
        with ChildProcess(command, ROOT) as child:
            printed = list(child.lines(lambda: self.seconds_left))
            failure = f"cut, {SPENT}" if child.was_cut else child.failure
        row = json.loads(printed[-1]) if printed and is_row(printed[-1]) and not child.was_cut else {}
        if "correct" not in row or "error" in row:
            self.notes.append(f"{label}: {row.get('error', failure)}")
            return None
        self.rows.append(row)
        return row


def is_row(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


Work = Callable[[str, bool, dict[str, Any], float], Section]


def main() -> int:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.small:
        sys.exit("gpu_report.py: no CUDA device here; --small tries the tool out on a CPU")
    # as an exception, so that a child in a session of its own is not left behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = arguments.output or ROOT / "docs" / "benchmarks" / f"{datetime.date.today()}-{slug(card(device))}"
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "card": card(device),
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "small": arguments.small,
    }
    ends = time.monotonic()
    for name in BUDGETS:
        print(f"{name} ...", flush=True)
        ends += BUDGETS[name]
        section = attempt(name, device, arguments.small, report, ends)
        report[name] = {"rows": section.rows, "notes": section.notes}
        write(report, folder)  # after each, so that nothing found is lost
    if not tests_failed(report):
        draw(report, folder)
    print(f"written to {folder}")
    return exit_status(report)


def attempt(name: str, device: str, small: bool, report: dict[str, Any], ends: float) -> Section:
    """A section, or a note of what kept it from its end: the others go on."""
    work: dict[str, Work] = {"rates": rates, "attention": attention, "training": training, "tests": tests}
    try:
        return work[name](device, small, report, ends)
    except Exception as error:
        return Section(name, ends, notes=[f"ended by {type(error).__name__}: {error}"])
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()  # processes of the other sections have the card for themselves


def tests_failed(report: dict[str, Any]) -> bool:
    """Not so where they were cut, or could not begin."""
    return any(row["result"] == "failed" for row in report.get("tests", {"rows": []})["rows"])


def exit_status(report: dict[str, Any]) -> int:
    """1 where a result was wrong; what could not run, or not in time, is named in the report."""
    wrong = any(row["correct"] is False for name in SPEEDS for row in report[name]["rows"])
    return 1 if wrong or tests_failed(report) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder (default: docs/benchmarks/<date>-<card>)")
    parser.add_argument("--small", action="store_true", help="toy sizes, in seconds, on any device")
    return parser.parse_args()


def card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def rates(device: str, small: bool, report: dict[str, Any], ends: float) -> Section:
    """Bytes a second of a copy (read and write counted) and operations a second of a bf16 matrix product."""
    section = Section("rates", ends)
    size, dtype = (2**9, torch.float32) if small else (2**13, torch.bfloat16)
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    source = torch.ones(2**20 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy, product = best(device, lambda: target.copy_(source)), best(device, lambda: torch.mm(a, b, out=c))
    section.rows = [{"bytes_per_s": 2 * source.numel() / copy, "flops_per_s": 2 * size**3 / product}]
    return section


def best(device: str, work: Callable[[], Any]) -> float:
    """Seconds of the best of 10 batches of 5."""
    found = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            work()
        synchronize(device)
        found.append((time.perf_counter() - start) / 5)
    return min(found)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def attention(device: str, small: bool, report: dict[str, Any], ends: float) -> Section:
    section = Section("attention", ends)
    wanted = wanted_rows(device, small)
    while len(section.rows) < len(wanted) and not section.is_spent:
        measure_rows(section, wanted[len(section.rows) :], report["rates"]["rows"])
    section.notes += [f"{label(row)}: left out, {SPENT}" for row in wanted[len(section.rows) :]]
    compare(section.rows)
    return section


def measure_rows(section: Section, wanted: list[BenchCase], measured: list[dict[str, float]]) -> None:
    """Rows of one process, up to one that takes it along: that one gets an error, and the next a new process."""
    tool, rows = Path(__file__).with_name("bench_attention.py"), iter(wanted)
    n_before = len(section.rows)
    with ChildProcess([sys.executable, str(tool), "--rows", json.dumps([asdict(row) for row in wanted])], ROOT) as child:
        for line in child.lines(lambda: min(LONGEST_SILENCE, section.seconds_left)):
            if is_row(line):
                row, found = next(rows), json.loads(line)
                if row.impl == "ours" and found["correct"] and measured:
                    found.update(roofline(row, measured[0], found["replayed"] or found["seconds"], found["keys"]))
                section.rows.append(found)
        failure = f"cut after {LONGEST_SILENCE} s" if child.was_cut else child.failure
    if section.seconds_left <= 0:
        failure = f"cut, {SPENT}"
    # a process that lost the device ends well, behind the row that lost it
    row = next(rows, None)
    if row is not None and (failure is not None or len(section.rows) == n_before):
        section.rows.append(attention_row(row, None, failure or "printed nothing"))


def wanted_rows(device: str, small: bool) -> list[BenchCase]:
    """Ours and the fastest exact kernel first, by length; then the others; then what takes half a minute each."""
    lengths = [256] if small else [2**12, 2**14, 2**16, 2**18, 2**20]
    sizes = [(seq_len, head_dim) for seq_len in lengths for head_dim in ([16] if small else [64, 128])]
    exact = "sdpa" if device == "cpu" else "cudnn"
    entries = [(*size, *entry) for size in sizes for entry in (("ours", 4), ("ours", 8), (exact, 8))]
    entries += [] if small else [(*size, "flash", 8) for size in sizes if size[0] <= LONGEST_FLASH]
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
    return impl in EXACT and seq_len > LONGEST_REPEATED


def label(row: BenchCase) -> str:
    return f"{row.impl}, {row.seq_len} tokens, heads of {row.head_dim}, {row.n_hashes} rounds"


def compare(rows: list[dict[str, Any]]) -> None:
    """How many times faster ours is than the fastest exact kernel at the same sizes; of both without the host."""

    def seconds(row: dict[str, Any]) -> float:
        return float(row["replayed"] or row["seconds"])

    for row in (row for row in rows if row["impl"] == "ours" and row["correct"]):
        same = [each for each in rows if all(each[key] == row[key] for key in ("seq_len", "head_dim"))]
        exact = [seconds(each) for each in same if each["impl"] in EXACT and each["correct"]]
        if exact:
            row["times_faster_than_exact"] = round(min(exact) / seconds(row), 2)


def roofline(row: BenchCase, measured: dict[str, float], seconds: float, keys: float) -> dict[str, float]:
    """What the work needs, and the share of the time that this would take at the card's measured rates.

    keys: how many a token meets in a round, on average. Forward has 2 products of head_dim for each pair,
    backward 5. Bytes are those that must be read or written at least once: q, v, out; then q, v, out, dO, dq, dv;
    and the ids.
    """
    flops = 7 * 2 * row.heads * row.seq_len * row.n_hashes * keys * row.head_dim
    width = getattr(torch, row.dtype).itemsize * row.head_dim
    n_bytes = row.heads * row.seq_len * (9 * width + 2 * row.n_hashes * 2)
    least = max(flops / measured["flops_per_s"], n_bytes / measured["bytes_per_s"])
    return {"flops": flops, "bytes": n_bytes, "roofline_share": round(least / seconds, 4)}


def training(device: str, small: bool, report: dict[str, Any], ends: float) -> Section:
    section = Section("training", ends)
    for seq_len in [128] if small else [2**14, 2**18, 2**20]:
        tool = str(Path(__file__).with_name("bench_step.py"))
        command = [sys.executable, tool, "--json", "--repeat", "2", *training_overrides(seq_len, small)]
        found = section.row(f"{seq_len} tokens", command)
        if found is None:
            break
        section.rows[-1] = {"seq_len": seq_len, **flatten_row(found)}
    return section


def training_overrides(seq_len: int, small: bool) -> list[str]:
    """Of bench_step.py: the model, the length and the precision."""
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
    """A row of bench_step.py with the shares of its parts in words; a wrong one has none."""
    split = row.pop("split", {})
    total = sum(split.values())
    return {**row, "split": ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in split.items())}


def tests(device: str, small: bool, report: dict[str, Any], ends: float) -> Section:
    section = Section("tests", ends)
    which = SOME_TESTS if small else ["tests/kernels", "tests/cuda", *NOT_HERE]
    command = [sys.executable, "-m", "pytest", "-vv", "--no-header", "-p", "no:cacheprovider", *which]
    if importlib.util.find_spec("xdist") is not None and not small:
        command += ["-n", "auto"]  # most of the time goes into compiling
    with ChildProcess(command, ROOT) as child:
        printed = list(child.lines(lambda: section.seconds_left))
        failure = f"cut, {SPENT}" if child.was_cut else child.failure
    verdicts = verdicts_of(printed)
    counts = {word.lower(): sum(verdict == word for verdict in verdicts.values()) for word in ("PASSED", "FAILED")}
    result = "failed" if counts["failed"] else "passed" if failure is None else "not finished"
    section.rows = [{"result": result, **counts}]
    section.notes = [f"{word} {test}" for test, word in verdicts.items() if word in ("FAILED", "ERROR")]
    if result == "not finished":
        section.notes.append(f"{failure}; pytest's last line: {printed[-1] if printed else 'none'}")
    return section


def verdicts_of(printed: list[str]) -> dict[str, str]:
    """PASSED, FAILED, ERROR or SKIPPED by test, as far as pytest came; its last word on each counts."""
    found = {}
    for line in printed:
        told = OF_A_TEST.fullmatch(line.rstrip())
        if told and (told[1] or told[3]):
            found[told[2]] = told[1] or told[3]
    return found


def write(report: dict[str, Any], folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# {report['card']}, {report['date']}",
        "",
        f"PyTorch {report['torch']}. `python tools/gpu_report.py`.",
    ]
    if report["small"]:
        lines += ["", "Toy sizes (`--small`): these numbers show that the tool works, and nothing else."]
    if "tests" not in report:
        lines += [
            "",
            "Written before the tests ran: each row of speed was checked by itself alone.",
        ]
    for name in (name for name in BUDGETS if name in report):
        rows, notes = report[name]["rows"], report[name]["notes"]
        if name in SPEEDS and tests_failed(report):
            rows, notes = (
                [],
                ["not shown, as tests failed: a wrong result has no speed (report.json has the rows)"],
            )
        lines += ["", f"## {name.capitalize()}", "", *table(rows)]
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [[f"{row.get(name, '-')}" for name in names] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *shown]] if rows else []


def draw(report: dict[str, Any], folder: Path) -> None:
    """Seconds over lengths, a plot for each width of heads."""
    rows = [row for row in report.get("attention", {}).get("rows", []) if row["correct"]]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    for head_dim in {row["head_dim"] for row in rows}:
        plot([row for row in rows if row["head_dim"] == head_dim], folder / f"attention-{head_dim}.png")


if __name__ == "__main__":
    sys.exit(main())
