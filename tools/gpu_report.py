#!/usr/bin/env python3
"""One command, under 9 minutes on a GPU: are the kernels right there, how fast, and how far does one card go?

tests      the tests of the kernels and those marked `cuda`, on this device
rates      what the card gives at best here: bytes a second of a copy, operations a second of a matrix product
attention  forward and backward beside PyTorch's exact kernels and FlexAttention (rows of bench_attention.py), with
           the share of the time that the card's rates say the work needs (the roofline)
training   steps of a 12-layer model, 1024 wide, at growing lengths until one does not fit (rows of bench_step.py),
           with their peak memory and what reformer_dist/planning says of it

Writes report.json, report.md and, where matplotlib is installed, plots. Sections have budgets: what is left
over of a long one is named in the report, and the rest goes on. No speed is shown where a check failed: if
the tests fail, sections of speed are not run at all. --small runs every section at toy sizes, also on a
CPU: it shows that the tool works, and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bench_step
import torch
from attention_rows import EXACT, Row
from bench_attention import plot

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {"tests": 150, "rates": 20, "attention": 220, "training": 120}  # seconds
# compiling for a card, where there is none, and this tool
NOT_HERE = ("--ignore=tests/kernels/test_compile.py", "--ignore=tests/kernels/test_gpu_report.py")
FLEX_LENGTHS = (2**14, 2**16)
LONGEST_FLASH = 2**16


@dataclass
class Section:
    """What a part of the report found, and what it left out."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return BUDGETS[self.name] - (time.monotonic() - self.started)

    def row(self, label: str, command: list[str]) -> dict[str, Any] | None:
        """The JSON that a process of its own prints last; None, and a note, where it prints none in time."""
        if self.seconds_left < 5:
            self.notes.append(f"{label}: left out, the section's {BUDGETS[self.name]} s were spent")
            return None
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=self.seconds_left, cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            self.notes.append(f"{label}: cut after the section's {BUDGETS[self.name]} s")
            return None
        if done.returncode == 0:
            self.rows.append(json.loads(done.stdout.splitlines()[-1]))
            return self.rows[-1]
        self.notes.append(f"{label}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        return None

    def stream(self, tool: str, rows: str) -> Iterator[dict[str, Any]]:
        """What one process prints for these rows, one after another, as long as there is time."""
        command = [sys.executable, str(Path(__file__).with_name(tool)), "--rows", rows]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        ) as process:
            cut = threading.Timer(self.seconds_left, process.kill)
            cut.start()
            assert process.stdout is not None
            yield from (json.loads(line) for line in process.stdout if line.endswith("}\n"))
            cut.cancel()


def main() -> int:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.small:
        sys.exit("gpu_report.py: no CUDA device here; --small tries the tool out on a CPU")
    folder = arguments.output or ROOT / "docs" / "benchmarks" / f"{datetime.date.today()}-{slug(card(device))}"
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "card": card(device),
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "small": arguments.small,
    }
    sections: list[Callable[[str, bool, dict[str, Any]], Section]] = [tests, rates, attention, training]
    for work in sections:
        print(f"{work.__name__} ...", flush=True)
        section = work(device, arguments.small, report)
        report[section.name] = {"rows": section.rows, "notes": section.notes}
        write(report, folder)  # after each, so that nothing found is lost
    print(f"written to {folder}")
    return (
        0 if report["tests"]["rows"][0]["passed"] and all(r["correct"] for r in report["attention"]["rows"]) else 1
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder (default: docs/benchmarks/<date>-<card>)")
    parser.add_argument("--small", action="store_true", help="toy sizes, in seconds, on any device")
    return parser.parse_args()


def card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def tests(device: str, small: bool, report: dict[str, Any]) -> Section:
    section = Section("tests")
    which = (
        ["tests/kernels/test_hash_kernel.py", "-k", "one_bucket"]
        if small
        else ["tests/kernels", "tests/cuda", *NOT_HERE]
    )
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *which]
    if importlib.util.find_spec("xdist") is not None and not small:
        command += ["-n", "auto"]  # most of the time goes into compiling
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=section.seconds_left
        )
        section.rows = [{"passed": done.returncode == 0}]
        if done.returncode:
            section.notes = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    except subprocess.TimeoutExpired:
        section.rows = [{"passed": False}]
        section.notes = [f"not finished after {BUDGETS['tests']} s"]
    return section


def may_show_speed(section: Section, report: dict[str, Any]) -> bool:
    if not report["tests"]["rows"][0]["passed"]:
        section.notes.append("not run: the tests failed, and a wrong result has no speed")
        return False
    return True


def rates(device: str, small: bool, report: dict[str, Any]) -> Section:
    """Bytes a second of a copy (read and write counted) and operations a second of a bf16 matrix product."""
    section = Section("rates")
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


def attention(device: str, small: bool, report: dict[str, Any]) -> Section:
    section = Section("attention")
    if not may_show_speed(section, report):
        return section
    wanted = attention_rows(device, small)
    for found in section.stream("bench_attention.py", json.dumps([asdict(row) for row in wanted])):
        row = wanted[len(section.rows)]
        if row.impl == "ours" and found["correct"]:
            found.update(roofline(row, report["rates"]["rows"][0], found["replayed"] or found["seconds"]))
        section.rows.append(found)
    section.notes += [
        f"{label(row)}: left out, the section's time was spent" for row in wanted[len(section.rows) :]
    ]
    compare(section.rows)
    return section


def attention_rows(device: str, small: bool) -> list[Row]:
    """Ours and the fastest exact kernel first, by length; then the others."""
    lengths = [256] if small else [2**12, 2**14, 2**16, 2**18, 2**20]
    sizes = [(seq_len, head_dim) for seq_len in lengths for head_dim in ([16] if small else [64, 128])]
    exact = "sdpa" if device == "cpu" else "cudnn"
    first = [(*size, *entry) for size in sizes for entry in (("ours", 4), ("ours", 8), (exact, 8))]
    others = [] if small else [(*size, "flash", 8) for size in sizes if size[0] <= LONGEST_FLASH]
    others += [] if small else [(*size, "flex", 4) for size in sizes if size[0] in FLEX_LENGTHS]
    return [
        Row(
            impl=impl,
            seq_len=seq_len,
            n_hashes=n_hashes,
            heads=2 if small else 16,
            head_dim=head_dim,
            window=64,
            n_buckets=None,
            dtype="float32" if small else "bfloat16",
            device=device,
            repeat=1 if impl in EXACT and seq_len > 2**18 else 5,
            threads=2,
        )
        for seq_len, head_dim, impl, n_hashes in first + others
    ]


def label(row: Row) -> str:
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


def roofline(row: Row, measured: dict[str, float], seconds: float) -> dict[str, float]:
    """What the work needs, and the share of the time that this would take at the card's measured rates.

    A token sees at most `window` keys a round. Forward has 2 products of head_dim for each pair, backward 5. Bytes
    are those that must be read or written at least once: q, v, out; then q, v, out, dO, dq, dv; and the ids.
    """
    pairs = row.heads * row.seq_len * row.n_hashes * row.window
    flops = 7 * 2 * pairs * row.head_dim
    width = getattr(torch, row.dtype).itemsize * row.head_dim
    n_bytes = row.heads * row.seq_len * (9 * width + 2 * row.n_hashes * 2)
    least = max(flops / measured["flops_per_s"], n_bytes / measured["bytes_per_s"])
    return {"flops": flops, "bytes": n_bytes, "roofline_share": round(least / seconds, 4)}


def training(device: str, small: bool, report: dict[str, Any]) -> Section:
    section = Section("training")
    if not may_show_speed(section, report):
        return section
    for seq_len in [128] if small else [2**14, 2**18, 2**20]:
        tool = str(Path(bench_step.__file__).resolve())
        command = [sys.executable, tool, "--json", "--repeat", "2", *training_overrides(seq_len, small)]
        found = section.row(f"{seq_len} tokens", command)
        if found is None:
            break
        section.rows[-1] = {"seq_len": seq_len, **in_one_line(found)}
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


def in_one_line(row: dict[str, Any]) -> dict[str, Any]:
    """A row of bench_step.py with the shares of its parts in words."""
    split = row.pop("split")
    total = sum(split.values())
    return {**row, "split": ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in split.items())}


def write(report: dict[str, Any], folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# {report['card']}, {report['date']}",
        "",
        f"PyTorch {report['torch']}. `python tools/gpu_report.py`.",
    ]
    if report["small"]:
        lines += ["", "Toy sizes (`--small`): these numbers show that the tool works, and nothing else."]
    for name in BUDGETS:
        if name in report:
            lines += ["", f"## {name.capitalize()}", "", *table(report[name]["rows"])]
            lines += ["", *(f"- {note}" for note in report[name]["notes"])] if report[name]["notes"] else []
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    draw(report, folder)


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
