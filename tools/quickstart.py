#!/usr/bin/env python3
"""From text to a trained model, step by step, each by the command that a user would type.

Run again, it keeps the data set and resumes the training.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
EXPERIMENT = "quickstart"
# real code that lies on every machine; what pip installed beside it is not the standard library
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def main() -> None:
    arguments = _parser().parse_args()
    text, name = _source(arguments.text)
    data, run = Path("data") / name, Path("outputs") / name
    if not (data / "dataset.json").is_file():
        suffixes = [] if arguments.text else ["--suffix", ".py"]
        print_heading(f"Cutting {text} into shards")
        make_shards = [sys.executable, str(TOOLS / "make_shards.py"), str(text), *suffixes]
        execute([*make_shards, "--shard-mb", "1", "--heldout", "0.1", "--output", str(data)])
    paths = [f"data.path={data}", f"output_dir={run}"]
    train = [command("reformer-train"), f"experiment={EXPERIMENT}", *paths, *arguments.overrides]
    print_heading("Training (the same command resumes)")
    execute(train)
    print_heading("Evaluating on text that was held out")
    execute([command("reformer-evaluate"), str(run), "--rows", "512"])
    print_heading("Writing")
    execute([command("reformer-generate"), str(run), "--prompt", arguments.prompt, "--max-new-tokens", "200"])
    _farewell(data, run, train)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file or folder; by default Python's standard library")
    parser.add_argument("--prompt", default="def ", help="what the sample goes on from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="given on to reformer-train")
    return parser


def _source(text: Path | None) -> tuple[Path, str]:
    """The text, and a name for its data set and run: another text gets other folders."""
    if text is None:
        return STDLIB, "quickstart"
    if not text.exists():
        sys.exit(f"error: TEXT={text}: there is no such file or folder")
    mark = hashlib.sha256(str(text.resolve()).encode()).hexdigest()[:8]
    return text, f"quickstart-{text.resolve().stem}-{mark}"


def command(name: str) -> str:
    """A command of this environment, whether or not it is on the PATH."""
    return str(Path(sys.executable).parent / name)


def print_heading(words: str) -> None:
    print(f"\n== {words}", flush=True)


def execute(command: list[str]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    status = subprocess.run(command).returncode
    if status != 0:
        sys.exit(status)


def _farewell(data: Path, run: Path, train: list[str]) -> None:
    print_heading("Done")
    print(f"data set     {data}")
    print(f"run          {run} (config.yaml, checkpoints/, tensorboard/)")
    print(f"go on        {shlex.join([*train, 'trainer.max_steps=1000'])}")
    print(f"TensorBoard  {command('tensorboard')} --logdir {run}")


if __name__ == "__main__":
    main()
