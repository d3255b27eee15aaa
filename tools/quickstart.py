#!/usr/bin/env python3
"""From text to a trained model in four steps; prints the command of each.

A second run reuses the dataset and resumes training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
EXPERIMENT = "quickstart"
# source code that is available on every machine (site-packages in it is skipped)
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def main() -> None:
    arguments = _parser().parse_args()
    refuse_paths(arguments.overrides)
    text, name = _source(arguments.text, arguments.heldout)
    data, run = Path("data") / name, Path("outputs") / name
    if not (data / "dataset.json").is_file():
        suffixes = [] if arguments.text else ["--suffix", ".py"]
        print_heading(f"Converting {text} to shards")
        make_shards = [sys.executable, str(TOOLS / "make_shards.py"), str(text), *suffixes]
        heldout = ["--heldout-from", *map(str, arguments.heldout)] if arguments.heldout else ["--heldout", "0.1"]
        execute([*make_shards, "--shard-mb", "1", *heldout, "--output", str(data)])
    paths = [f"data.path={data}", f"output_dir={run}"]
    train = [command("reformer-train"), f"experiment={EXPERIMENT}", *paths, *arguments.overrides]
    print_heading("Training (run the same command again to resume)")
    execute(train)
    print_heading("Evaluating on held-out text")
    whole, without_lsh = run / "evaluation.json", run / "evaluation-without-lsh.json"
    evaluate = [command("reformer-evaluate"), str(run), "--rows", "64", "--by-position"]
    execute([*evaluate, "--output", str(whole)])
    print_heading("Evaluating without the LSH layers")
    execute([*evaluate, "--without", "lsh", "--output", str(without_lsh)])
    print_heading("Generating a sample")
    prompt = arguments.prompt if arguments.prompt is not None else "" if arguments.text else "def "
    execute([command("reformer-generate"), str(run), f"--prompt={prompt}", "--max-new-tokens", "200"])
    _print_summary(data, run, train, *(json.loads(path.read_text()) for path in (whole, without_lsh)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file or folder (default: Python's standard library)")
    parser.add_argument(
        "--heldout",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="files to evaluate on (default: a tenth of the text)",
    )
    parser.add_argument("--prompt", help="prompt of the generated sample (default: 'def ', and none with --text)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides passed to reformer-train")
    return parser


def _source(text: Path | None, heldout: list[Path] | None) -> tuple[Path, str]:
    """The text, and a name for its dataset and run, which is another one once a file of it changes."""
    if text is None and not heldout:
        return STDLIB, "quickstart"
    for name, path in [("TEXT", text or STDLIB), *(("HELDOUT", path) for path in heldout or [])]:
        if not path.exists():
            sys.exit(f"error: {name}={path}: no such file or folder")
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for root in (text or STDLIB, *(heldout or []))
        for path in sorted([root.resolve(), *root.resolve().rglob("*")])
    ]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    return text or STDLIB, f"quickstart-{(text or STDLIB).resolve().stem}-{digest}"


def refuse_paths(overrides: list[str]) -> None:
    """Exits if overrides choose the dataset or run, which a tool that trains and evaluates names itself."""
    for word in overrides:
        if word.partition("=")[0].lstrip("+") in ("data.path", "output_dir"):
            sys.exit(f"error: {word}: this tool names dataset and run itself; leave it out or call reformer-train")


def command(name: str) -> str:
    """Path of a command in this environment, which need not be on PATH."""
    return str(Path(sys.executable).parent / name)


def print_heading(heading: str) -> None:
    print(f"\n== {heading}", flush=True)


def execute(command: list[str]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    status = subprocess.run(command).returncode
    if status != 0:
        sys.exit(status)


def _print_summary(
    data: Path, run: Path, train: list[str], whole: dict[str, Any], without_lsh: dict[str, Any]
) -> None:
    print_heading("Done")
    gzip, bits = whole["gzip_bits_per_byte"], whole["bits_per_byte"]
    first, last = whole["by_position"][0], whole["by_position"][-1]
    positions = f"{first['bits_per_byte']:.2f} at the first {first['last'] + 1} positions of a row, "
    positions += f"{last['bits_per_byte']:.2f} from {last['first']:,} on"
    print(f"held out     {bits:.2f} bits per byte (gzip -9: {gzip:.2f}); {positions}")
    print(f"LSH          {without_lsh['bits_per_byte']:.2f} bits per byte without the attention of the LSH layers")
    print(f"dataset      {data}")
    print(f"run          {run} (config.yaml, checkpoints/, tensorboard/)")
    longer = [f"optim.restarts=[{_last_step(run)}]", f"trainer.max_steps={2 * _last_step(run)}"]
    replaced = tuple(word.partition("=")[0] + "=" for word in longer)
    kept = [word for word in train if not word.startswith(replaced)]
    print(f"continue     {shlex.join([*kept, *longer])}")
    print(f"TensorBoard  {command('tensorboard')} --logdir {run}")


def _last_step(run: Path) -> int:
    """Of the newest checkpoint."""
    return max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))


if __name__ == "__main__":
    main()
