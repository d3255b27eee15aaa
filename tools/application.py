#!/usr/bin/env python3
"""From raw files to the evaluation of a task; prints the command of each step.

  translation         --train train.en train.de --heldout test.en test.de
  question_answering  --train train.json --heldout dev.json, in SQuAD's format
  summarisation       --train and --heldout: JSON lines of document and summary (default: standard library)
  classification      --train and --heldout: JSON lines of text and label (default: standard library)
  duplication         random texts to be repeated
  mqar                multi-query associative recall: pairs of key and value, then the keys in another order
  joint_recall        keys whose values depend on the context that they are in
  induction           the token that followed a special one before
  needle              numbers hidden in text, and questions about them at its end

A second run reuses the dataset and resumes training.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from quickstart import TOOLS, command, execute, print_heading, refuse_paths


@dataclass(frozen=True)
class Application:
    """Conversion of raw files to a dataset, and evaluation of the model; the rest is in conf/experiment/."""

    input_format: list[str]
    """Arguments of reformer-shards that describe the inputs."""
    generator: list[str] | None = None
    """Arguments of make_task_data.py, used without --train; None if --train is required."""
    tokenizer: tuple[str, ...] = ()
    heldout: str = "0.05"
    """Held-out fraction, used without --heldout."""
    evaluate: tuple[tuple[str, ...], ...] = ((),)
    """Arguments of each call of reformer-evaluate."""
    is_recall: bool = False
    """Whether make_recall_data.py writes the dataset; there are no raw files."""


APPLICATIONS = {
    "translation": Application([], None, ("--tokenizer", "bpe", "--vocab-size", "4000")),
    "question_answering": Application(
        ["--squad"], None, ("--tokenizer", "bpe", "--vocab-size", "4000"), evaluate=(("--split", "train"), ())
    ),
    "summarisation": Application(
        ["--fields", "document", "summary"], ["summaries"], ("--tokenizer", "bpe", "--vocab-size", "4000")
    ),
    "classification": Application(["--fields", "text", "--label", "label"], ["packages"], heldout="0.2"),
    **{name: Application([], is_recall=True) for name in ("mqar", "joint_recall", "induction", "needle")},
    "duplication": Application(
        ["--fields", "prompt", "completion"],
        ["duplication", "--samples", "40000"],
        heldout="0.01",
        evaluate=(("--rounds", "1,2,4,8"),),
    ),
}


def main() -> None:
    # --train and --heldout consume all arguments up to the next option: overrides are removed first
    overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    arguments = _parser().parse_args([word for word in sys.argv[1:] if word not in overrides])
    refuse_paths(overrides)
    name, application = arguments.name, APPLICATIONS[arguments.name]
    data, output = Path("data") / name, Path("outputs") / name
    if not (data / "dataset.json").is_file():
        _write_shards(arguments, application, data)
    train = [command("reformer-train"), f"experiment={name}", f"data.path={data}", f"output_dir={output}"]
    print_heading("Training (run the same command again to resume)")
    execute([*train, *overrides])
    print_heading("Evaluating")
    for options in application.evaluate:
        execute([command("reformer-evaluate"), str(output), "--batch", "32", *options])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s NAME [--train FILE ...] [--heldout FILE ...] [key=value ...]",
        description=__doc__,
        epilog="overrides such as trainer.max_steps=100 are passed to reformer-train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(APPLICATIONS))
    parser.add_argument("--train", nargs="+", type=Path, default=[], metavar="FILE", help="raw files to train on")
    parser.add_argument(
        "--heldout", nargs="+", type=Path, default=[], metavar="FILE", help="raw files to evaluate on"
    )
    return parser


def _write_shards(arguments: argparse.Namespace, application: Application, data: Path) -> None:
    files = [str(path) for path in arguments.train]
    if application.is_recall:
        if files or arguments.heldout:
            sys.exit(f"error: {arguments.name} generates its data; leave out --train and --heldout")
        print_heading("Generating the dataset")
        execute([sys.executable, str(TOOLS / "make_recall_data.py"), arguments.name, "--output", str(data)])
        return
    if not files:
        if application.generator is None:
            sys.exit(f"error: {arguments.name} needs --train and --heldout; see --help")
        generated = data.with_suffix(".jsonl")
        print_heading("Generating raw files")
        execute(
            [sys.executable, str(TOOLS / "make_task_data.py"), *application.generator, "--output", str(generated)]
        )
        files = [str(generated)]
    print_heading(f"Converting {' and '.join(files)} to shards")
    if arguments.name == "translation":
        if len(files) != 2:
            sys.exit("error: translation needs two files each for --train and --heldout: source and target")
        files = ["--source", files[0], "--target", files[1]]
    heldout = ["--heldout-from", *map(str, arguments.heldout)] if arguments.heldout else []
    split = heldout or ["--heldout", application.heldout]
    make_shards = [sys.executable, str(TOOLS / "make_shards.py"), *files, *application.input_format]
    execute([*make_shards, *application.tokenizer, *split, "--output", str(data)])


if __name__ == "__main__":
    main()
