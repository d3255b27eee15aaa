#!/usr/bin/env python3
"""From raw files to the measure of a task, step by step, each by the command that a user would type.

  translation         --train train.en train.de --heldout test.en test.de
  question_answering  --train train.json --heldout dev.json, in SQuAD's format
  summarisation       --train and --heldout of JSON lines of document and summary, or functions of this Python
  classification      --train and --heldout of JSON lines of text and label, or files of this Python
  duplication         random texts that are to be said again

Run again, it keeps the data set and resumes the training.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from quickstart import TOOLS, command, execute, print_heading


@dataclass(frozen=True)
class Application:
    """How raw files become a data set, and how what was trained is measured; conf/experiment/ has the rest."""

    form: list[str]
    """Arguments of make_shards.py that print_heading what the inputs are."""
    ready: list[str] | None = None
    """Arguments of make_task_data.py where no files are given; None where they must be."""
    tokenizer: tuple[str, ...] = ()
    heldout: str = "0.05"
    """Share that is held out where it is not given."""
    evaluate: tuple[tuple[str, ...], ...] = ((),)
    """Arguments of reformer-evaluate, once for each time that it is asked."""


APPLICATIONS = {
    "translation": Application([], None, ("--tokenizer", "bpe", "--vocab-size", "4000")),
    "question_answering": Application(
        ["--squad"], None, ("--tokenizer", "bpe", "--vocab-size", "4000"), evaluate=(("--split", "train"), ())
    ),
    "summarisation": Application(
        ["--fields", "document", "summary"], ["summaries"], ("--tokenizer", "bpe", "--vocab-size", "4000")
    ),
    "classification": Application(["--fields", "text", "--label", "label"], ["packages"], heldout="0.2"),
    "duplication": Application(
        ["--fields", "prompt", "completion"],
        ["duplication", "--samples", "40000"],
        heldout="0.01",
        evaluate=(("--rounds", "1,2,4,8"),),
    ),
}


def main() -> None:
    # --train and --heldout take all words up to the next option: those with a sign are not files
    overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    arguments = _parser().parse_args([word for word in sys.argv[1:] if word not in overrides])
    name, application = arguments.name, APPLICATIONS[arguments.name]
    data, output = Path("data") / name, Path("outputs") / name
    if not (data / "dataset.json").is_file():
        _write_shards(arguments, application, data)
    train = [command("reformer-train"), f"experiment={name}", f"data.path={data}", f"output_dir={output}"]
    print_heading("Training (the same command resumes)")
    execute([*train, *overrides])
    print_heading("Measuring")
    for options in application.evaluate:
        execute([command("reformer-evaluate"), str(output), "--batch", "32", *options])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s NAME [--train FILE ...] [--heldout FILE ...] [key=value ...]",
        description=__doc__,
        epilog="key=value, such as trainer.max_steps=100, is given on to reformer-train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(APPLICATIONS))
    parser.add_argument("--train", nargs="+", type=Path, default=[], metavar="FILE", help="raw files to train on")
    parser.add_argument("--heldout", nargs="+", type=Path, default=[], metavar="FILE", help="and to measure with")
    return parser


def _write_shards(arguments: argparse.Namespace, application: Application, data: Path) -> None:
    files = [str(path) for path in arguments.train]
    if not files:
        if application.ready is None:
            sys.exit(f"error: {arguments.name} needs --train and --heldout; see --help")
        made = data.with_suffix(".jsonl")
        print_heading("Making raw files")
        execute([sys.executable, str(TOOLS / "make_task_data.py"), *application.ready, "--output", str(made)])
        files = [str(made)]
    print_heading(f"Cutting {' and '.join(files)} into shards")
    if arguments.name == "translation":
        if len(files) != 2:
            sys.exit("error: translation needs two files for --train, and two for --heldout: source and target")
        files = ["--source", files[0], "--target", files[1]]
    apart = ["--heldout-from", *map(str, arguments.heldout)] if arguments.heldout else []
    split = apart or ["--heldout", application.heldout]
    make_shards = [sys.executable, str(TOOLS / "make_shards.py"), *files, *application.form]
    execute([*make_shards, *application.tokenizer, *split, "--output", str(data)])


if __name__ == "__main__":
    main()
