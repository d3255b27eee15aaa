#!/usr/bin/env python3
"""Repeats the rows of docs/evidence.md: what LSH attention learns, beside local and exact attention.

  small_recall  multi-query associative recall of 128 tokens and 256 ids, which exact attention learns as well
  mqar          the same in the sizes of zoology, and read at 1,024 to 16,384 tokens
  joint_recall  joint recall in the format of HAX, 8 x 8
  duplication   Table 2 of the Reformer paper: trained with 4 and with 1 hash rounds, evaluated with 8, 4, 2 and 1
  text          source code of installed packages in rows of 4,096 bytes: bits per byte by position
  stages        a run in stages of 512, 2,048 and 8,192 tokens beside one of 8,192 throughout, of equal tokens
                per step: bits per byte of each checkpoint in rows of 8,192, over tokens and time (also a plot)

Each row trains and evaluates by the ordinary commands, which are printed. Its result is saved as soon as it is
measured; run again, the tool continues where it stopped. Without names, all rows run, the shortest first.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quickstart import TOOLS, command, execute, print_heading, refuse_paths

from reformer_dist.data import ByteTokenizer, RawSample, write_samples
from reformer_dist.fs.atomic import write_atomic

NO_NEXT = "model.next_value_heads=0"
LAYERS = {
    "lsh": [],
    "lsh_own_values": [NO_NEXT],
    "exact": ["model.layers=[local,exact]", NO_NEXT],
    "local": ["model.layers=[local,local]", NO_NEXT],
}
"""Overrides of the second layer of each pair, by the name of the row."""
ABLATIONS = {
    "lsh_no_conv": ["model.qk_conv=0"],
    "lsh_rotary": ["model.qk_conv=0", "model.rotary_layers=[local,lsh,exact]"],
}
HELDOUT_PACKAGES = {"aiohttp", "alembic", "idlelib", "joblib", "networkx", "werkzeug"}
SAME_OPTIONS = {"one_bucket": ["model.n_buckets=1", "model.n_hashes=1", "model.window=4096"]}
"""Exact attention with all options of the LSH layers: a bucket and a window that hold the whole row."""
RECALL_LAYERS = {
    **LAYERS,
    "exact_long": [*LAYERS["exact"], "trainer.max_steps=5000"],
    "exact_shared_qk": [NO_NEXT, "model.n_buckets=1", "model.n_hashes=1", "model.window=128"],
    "exact_next": ["model.n_buckets=1", "model.n_hashes=1", "model.window=128"],
    "lsh_own_keys": [NO_NEXT, "model.shared_qk=false"],
    "lsh_own_keys_next": ["model.shared_qk=false"],
}
"""exact_shared_qk, exact_next: LSH layers with a single bucket that holds the whole row."""
PART_BYTES = 512 * 1024


@dataclass(frozen=True)
class Row:
    """A model, trained once per seed and evaluated in several ways."""

    claim: str
    name: str
    minutes: float
    """Of training on two cores."""
    experiment: str
    data: str
    """Name of the dataset."""
    train: list[str] = field(default_factory=list)
    """Overrides of training."""
    evaluate: dict[str, list[str]] = field(default_factory=dict)
    """Options of reformer-evaluate, by the name of the result."""
    curve: list[str] = field(default_factory=list)
    """Options of reformer-evaluate for each checkpoint of the run, which keeps all of them."""


def rows() -> Iterator[Row]:
    far = {
        str(n): [
            *(f"data.path={{data}}/mqar_{n}", f"data.seq_len={n}"),
            *(f"model.n_buckets={n // 8}", "model.n_hashes=8", "model.window=128", "--batch", "1"),
        ]
        for n in (1024, 4096, 16384)
    }
    small = [
        *(
            "model.window=16",
            "data.seq_len=128",
            "data.batch_size=32",
            "optim.warmup_steps=100",
            "trainer.max_steps=1500",
        ),
    ]
    for name, layers in RECALL_LAYERS.items():
        yield Row(
            "small_recall", name, 2, "mqar", "mqar_small", [*small, *layers], {"distances": ["--batch", "32"]}
        )
    for name, layers in LAYERS.items():
        yield Row("mqar", name, 5, "mqar", "mqar", layers, {"sizes": ["--batch", "32"], **far})
    long = [*LAYERS["exact"], "trainer.max_steps=6000", "trainer.eval_every=500"]
    yield Row("mqar", "exact_long", 40, "mqar", "mqar", long, {"sizes": ["--batch", "32"]})
    for name, layers in LAYERS.items():
        yield Row("joint_recall", name, 4, "joint_recall", "joint_recall", layers, {"sizes": ["--batch", "32"]})
    for rounds in (4, 1):
        overrides = [
            *("data.seq_len=1024", "data.batch_size=8", "model.n_buckets=32", f"model.n_hashes={rounds}"),
            *("model.dim=256", "model.ff_mult=1", "model.position=rotary", "model.rotary_layers=[local,exact]"),
            *("model.window=64", "model.next_value_heads=4", "model.qk_conv=3"),
            *("optim.lr=3e-3", "trainer.max_steps=500"),
        ]
        table = {str(n): [f"model.n_hashes={n}", "--rows", "302"] for n in (8, 4, 2, 1)}
        yield Row("duplication", f"{rounds} rounds", 3, "duplication", "duplication_1024", overrides, table)
    text = [
        *("data.seq_len=4096", "data.batch_size=2", "trainer.max_steps=2500", "model.n_buckets=64"),
        *("optim.lr=3e-3", "optim.warmup_steps=100", "trainer.eval_every=250", "trainer.sample_every=0"),
    ]
    measure = ["--rows", "512", "--batch", "4"]
    for name, layers in (LAYERS | ABLATIONS | SAME_OPTIONS).items():
        local_round = ["model.local_round=true"] * name.startswith("lsh")
        knocked_out = {"without": [*measure, "--without", name]} if name in ("lsh", "exact") else {}
        evaluate = {
            "positions": [*measure, "--by-position"],
            "context": [*measure, "--context", "256,1k,4k"],
            **knocked_out,
        }
        yield Row("text", name, 40, "quickstart", "python", [*text, *local_round, *layers], evaluate)
    yield from stage_rows()


def stage_rows() -> Iterator[Row]:
    """Runs of 1500 steps of 8,192 tokens."""
    first, second = (
        f"{{until:{step},data.seq_len:{length},data.batch_size:{8192 // length},model.n_buckets:{length // 32}}}"
        for step, length in ((500, 512), (1000, 2048))
    )
    last = ["data.seq_len=8192", "data.batch_size=1", "model.n_buckets=256", "model.window=32"]
    overrides = [
        *(*last, "trainer.max_steps=1500", "trainer.save_every=100", "trainer.keep_checkpoints=0"),
        *("trainer.eval_every=0", "trainer.sample_every=0"),
    ]
    measure = [*last, "--rows", "48", "--batch", "1"]
    for name, stages in (("512, 2048, 8192", [f"stages=[{first},{second}]"]), ("8192", [])):
        positions = {"positions": [*measure, "--by-position"]}
        yield Row("stages", name, 15, "quickstart", "stdlib", [*overrides, *stages], positions, measure)


def main() -> None:
    arguments = _parse()
    selected = [row for row in rows() if not arguments.claims or row.claim in arguments.claims]
    selected = [row for row in selected if not arguments.rows or row.name in arguments.rows]
    if arguments.list:
        for row in selected:
            print(f"{row.claim:14} {row.name:16} {row.minutes:>5g} minutes of training per seed")
        return
    for row in sorted(selected, key=lambda row: row.minutes):
        for seed in range(arguments.seeds if row.minutes <= 15 else 1):
            run_row(row, seed, arguments.output, arguments.overrides)
    if any(row.curve for row in selected):
        plot_curves(arguments.output / "results", arguments.output / "stages.png")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("claims", nargs="*", help="small_recall, mqar, joint_recall, duplication, text, stages (default: all)")
    add("--rows", nargs="+", help="only these rows, such as lsh exact")
    add("--seeds", type=int, default=3, help="seeds of rows of 15 minutes or less (default: 3); others have one")
    add("--output", type=Path, default=Path("outputs/evidence"), help="datasets, runs and results")
    add("--list", action="store_true", help="list the rows instead")
    # overrides are told apart by their =
    words = sys.argv[1:]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    arguments = parser.parse_intermixed_args([word for word in words if word not in overrides])
    refuse_paths(overrides)
    known = {row.claim for row in rows()}
    if unknown := set(arguments.claims) - known:
        parser.error(f"{', '.join(sorted(unknown))}: must be one of {', '.join(sorted(known))}")
    return argparse.Namespace(**vars(arguments), overrides=overrides)


def run_row(row: Row, seed: int, output: Path, overrides: list[str]) -> None:
    """Trains and evaluates a row with one seed, unless its result is there."""
    result = output / "results" / f"{row.claim}-{row.name.replace(', ', '_').replace(' ', '_')}-{seed}.json"
    if result.is_file():
        print(f"{result} is there")
        return
    print_heading(f"{row.claim}, {row.name}, seed {seed}")
    data, run = output / "data", output / "runs" / result.stem
    make_dataset(row.data, data)
    started = time.monotonic()
    paths = [f"data.path={data / row.data}", f"output_dir={run}", f"trainer.seed={seed}"]
    execute([command("reformer-train"), f"experiment={row.experiment}", *paths, *row.train, *overrides])
    values: dict[str, Any] = {
        "claim": row.claim,
        "row": row.name,
        "seed": seed,
        "overrides": row.train + overrides,
    }
    values["train_s"] = round(time.monotonic() - started)
    values["evaluations"] = evaluations_of(run)
    for name, options in row.evaluate.items():
        if name.isdecimal() and row.claim == "mqar":
            make_dataset(f"mqar_{name}", data)
        target = run / f"evaluation-{name}.json"
        options = [option.format(data=data) for option in options]
        execute([command("reformer-evaluate"), str(run), *options, "--output", str(target)])
        values[name] = json.loads(target.read_text())
    if row.curve:
        values["curve"] = measure_curve(run, row.curve)
    result.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(result, json.dumps(values, indent=1) + "\n")


def measure_curve(run: Path, options: list[str]) -> list[dict[str, float]]:
    """Held-out bits per byte of each checkpoint, with the tokens and the seconds of training up to it."""
    curve, seconds, tokens = [], metrics_of(run, "time_s"), 8192
    for folder in sorted((run / "checkpoints").glob("step-*")):
        target, step = run / f"evaluation-{folder.name}.json", int(folder.name.removeprefix("step-"))
        if not target.is_file():
            execute([command("reformer-evaluate"), str(folder), *options, "--output", str(target)])
        bits = json.loads(target.read_text())["bits_per_byte"]
        curve.append({"step": step, "tokens": step * tokens, "time_s": seconds[step], "bits_per_byte": bits})
    return curve


def evaluations_of(run: Path) -> dict[int, dict[str, float]]:
    """Held-out metrics by step of training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: {name: line[name] for name in line if name.startswith("eval/")} for line in lines}
    return {step: metrics for step, metrics in found.items() if metrics}


def metrics_of(run: Path, name: str) -> dict[int, float]:
    """A metric by step, of the last logged step up to each."""
    found, last = {}, 0.0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line[name] for line in lines if name in line}
    for step in range(max(logged) + 1):
        last = logged.get(step, last)
        found[step] = last
    return found


def plot_curves(results: Path, path: Path) -> None:
    """Bits per byte over tokens and over seconds, a line per row and seed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names: list[str] = []
    for file in sorted(results.glob("stages-*.json")):
        result = json.loads(file.read_text())
        is_first = result["row"] not in names
        names += [result["row"]] if is_first else []
        for each, key in zip(axes, ("tokens", "time_s"), strict=True):
            points = [point[key] for point in result["curve"]]
            bits = [point["bits_per_byte"] for point in result["curve"]]
            label = f"rows of {result['row']}" if is_first else None
            each.plot(points, bits, color=f"C{names.index(result['row'])}", label=label)
    axes[0].set(xlabel="tokens", ylabel="held-out bits per byte, rows of 8,192")
    axes[1].set(xlabel="seconds of training")
    axes[1].legend()
    figure.savefig(path, dpi=150)
    print(f"plot         {path}")


def make_dataset(name: str, folder: Path) -> None:
    """Writes a dataset, unless it is there."""
    target = folder / name
    if (target / "dataset.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if name == "python":
        write_python(target)
    elif name == "stdlib":
        options = ["--suffix", ".py", "--shard-mb", "1", "--heldout", "0.1", "--output", target]
        _tool("make_shards.py", sysconfig.get_paths()["stdlib"], *options)  # the data of the quickstart
    elif name == "duplication_1024":
        lines = folder / f"{name}.jsonl"
        _tool("make_task_data.py", "duplication", "--samples", "60000", "--length", "511", "--output", lines)
        _tool(
            "make_shards.py", lines, "--fields", "prompt", "completion", "--heldout", "0.005", "--output", target
        )
    elif name == "mqar_small":
        sizes = ["--tokens", "128", "--pairs", "16", "--vocab-size", "256", "--samples", "50000"]
        _tool("make_recall_data.py", "mqar", *sizes, "--heldout", "500", "--output", target)
    elif name.startswith("mqar_"):
        sizes = ["--tokens", name.removeprefix("mqar_"), "--pairs", "64", "--samples", "1", "--heldout", "100"]
        _tool("make_recall_data.py", "mqar", *sizes, "--output", target)
    else:
        _tool("make_recall_data.py", name, "--output", target)


def write_python(target: Path) -> None:
    """Source code of the installed packages and the standard library; a document is up to 512 KiB of a package."""
    documents = {is_heldout: list[RawSample]() for is_heldout in (False, True)}
    for package, files in sorted(_packages().items()):
        part: list[bytes] = []
        for number, (path, text) in enumerate(files):
            part.append(f"# {path}\n".encode() + text + b"\n")
            if sum(map(len, part)) > PART_BYTES or number == len(files) - 1:
                documents[package in HELDOUT_PACKAGES].append(RawSample(f"{package}:{number}", (b"".join(part),)))
                part = []
    write_samples(documents[False], target, ByteTokenizer(), shard_bytes=4 << 20, heldout=documents[True])


def _packages() -> dict[str, list[tuple[str, bytes]]]:
    """(path, content) of the files of each package."""
    packages: dict[str, list[tuple[str, bytes]]] = {}
    for root in sorted({Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")}):
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if inside.parts[0] not in ("site-packages", "dist-packages", "test"):
                packages.setdefault(inside.parts[0], []).append((str(inside), path.read_bytes()))
    return packages


def _tool(name: str, *options: object) -> None:
    execute([sys.executable, str(TOOLS / name), *map(str, options)])


if __name__ == "__main__":
    main()
