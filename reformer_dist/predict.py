"""reformer-predict: predictions of a trained model as JSON lines. `reformer-predict RUN --text "..."`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from reformer_dist.config import TaskKind
from reformer_dist.errors import ConfigError, DataError
from reformer_dist.inference import load
from reformer_dist.inference.predictor import BATCH_SIZE, Predictor
from reformer_dist.process.command import run_command
from reformer_dist.process.version import add_version
from reformer_dist.run.pretrained import add_weight_choice

FIELDS = {
    TaskKind.sequence_classification: ("text",),
    TaskKind.masked_language_model: ("text",),
    TaskKind.question_answering: ("question", "context"),
    TaskKind.sequence_to_sequence: ("source",),
}
"""Inputs of each kind of task that predicts."""
PREDICTION = "prediction"
EPILOG = """\
examples:
  reformer-predict outputs/classification --text "import os"
  reformer-predict outputs/question_answering --question "Who?" --context "Brooks left IBM in 1965."
  reformer-predict outputs/translation --jsonl in.jsonl --fields english --output out.jsonl
  cat lines.txt | reformer-predict outputs/translation --lines -
"""

Record = tuple[str, dict[str, Any]]
"""Where it is from, for error messages, and its fields."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-predict",
        description="Predicts classes, answers, masked tokens, translations or summaries, with scores. Writes one "
        "JSON object per input, in order: its fields, and the prediction.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    add = parser.add_argument
    add("run", type=Path, help="a run directory (its newest checkpoint), a checkpoint or an export")
    add("overrides", nargs="*", metavar="key=value", help="such as model.n_hashes=8 or task.beams=4")
    add_weight_choice(parser)
    for name in ("text", "question", "context", "source"):
        add(f"--{name}", action="append", default=[], metavar="TEXT", help="an input; may be repeated")
    add("--jsonl", metavar="FILE", help="read inputs from JSON lines; - is standard input")
    add("--lines", metavar="FILE", help="read inputs from lines of text; - is standard input")
    fields = "fields of the JSON lines to read, instead of text, question and context, or source"
    add("--fields", nargs="+", metavar="NAME", help=fields)
    add("--top-k", type=int, default=5, metavar="K", help="candidates for each <mask> (default: 5)")
    add("--batch", type=int, default=BATCH_SIZE, metavar="N", help=f"inputs per batch (default: {BATCH_SIZE})")
    add("--output", type=Path, metavar="FILE", help="write to a file instead of standard output")
    return parser


def run_prediction(arguments: argparse.Namespace) -> None:
    """Loads the model and writes a prediction for each input, a batch at a time. Raises UserError."""
    for name, value in (("batch", arguments.batch), ("top-k", arguments.top_k)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be positive")
    if arguments.fields and not arguments.jsonl:
        raise ConfigError(f"--fields {' '.join(arguments.fields)}: needs --jsonl")
    model = load(arguments.run, *arguments.overrides, average=arguments.average, best=arguments.best)
    kind = model.config.task.kind
    if kind not in FIELDS:
        fix = "continue texts with reformer-generate"
        raise ConfigError(f"task.kind={kind.name}: {model.checkpoint} predicts the next token; {fix}")
    fields = FIELDS[kind]
    names = arguments.fields or list(fields)
    if len(names) != len(fields):
        raise ConfigError(f"--fields {' '.join(names)}: must name {len(fields)}, for {' and '.join(fields)}")
    records = _records(arguments, fields, names)
    with _open_output(arguments.output) as output:
        while batch := list(islice(records, arguments.batch)):
            inputs = [[_text_of(where, record, name) for name in names] for where, record in batch]
            predictions = _predict(model, batch, inputs, arguments)
            for (_, record), prediction in zip(batch, predictions, strict=True):
                output.write(json.dumps({**record, PREDICTION: asdict(prediction)}, ensure_ascii=False) + "\n")
            output.flush()


def _predict(
    model: Predictor, batch: list[Record], inputs: list[list[str]], arguments: argparse.Namespace
) -> list[Any]:
    kind, size = model.config.task.kind, arguments.batch
    columns = [list(column) for column in zip(*inputs, strict=True)]
    try:
        if kind is TaskKind.sequence_classification:
            return list(model.classify(*columns, batch_size=size))
        if kind is TaskKind.masked_language_model:
            return list(model.fill_mask(*columns, top_k=arguments.top_k, batch_size=size))
        if kind is TaskKind.question_answering:
            return list(model.answer(*columns, batch_size=size))
        return list(model.write(*columns, batch_size=size))
    except ConfigError as error:
        raise ConfigError(f"{batch[0][0]} to {batch[-1][0]}: {error}") from error


def _records(arguments: argparse.Namespace, fields: tuple[str, ...], names: list[str]) -> Iterator[Record]:
    """The inputs of the one source that is given. Raises ConfigError."""
    given = {name: getattr(arguments, name) for name in ("text", "question", "context", "source")}
    texts = {name: values for name, values in given.items() if values}
    n_sources = bool(texts) + (arguments.jsonl is not None) + (arguments.lines is not None)
    options = " and ".join(f"--{name}" for name in fields)
    if n_sources != 1:
        raise ConfigError(f"{options}: give it, --jsonl or --lines, and only one of these; got {n_sources}")
    if arguments.jsonl is not None:
        return _json_lines(arguments.jsonl)
    if arguments.lines is not None:
        if len(fields) > 1:
            raise ConfigError(f"--lines {arguments.lines}: this model reads {options}; give --jsonl")
        return _lines(arguments.lines, fields[0])
    for name in texts:
        if name not in fields:
            raise ConfigError(f"--{name}: is no input of this model, which reads {options}")
    if len(texts.get("context", ())) == 1:
        texts["context"] = texts["context"] * len(texts.get("question", [""]))
    counts = [len(texts.get(name, ())) for name in fields]
    if len(set(counts)) > 1:
        raise ConfigError(f"{options}: got {' and '.join(map(str, counts))}; give one context, or one each")
    rows = zip(*(texts[name] for name in fields), strict=True)
    return iter([(f"input {n}", dict(zip(fields, row, strict=True))) for n, row in enumerate(rows, 1)])


def _json_lines(file: str) -> Iterator[Record]:
    """Raises DataError for a line that is no object."""
    for where, line in _numbered_lines(file):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise DataError(f"{where}: is not JSON ({error})") from error
        if record is None and not line.strip():
            continue
        if not isinstance(record, dict):
            raise DataError(f"{where}: {line[:40]!r} must be an object with the fields of an input")
        if PREDICTION in record:
            raise DataError(f"{where}: has a field {PREDICTION}, which would be overwritten; rename it")
        yield where, record


def _lines(file: str, field: str) -> Iterator[Record]:
    for where, line in _numbered_lines(file):
        yield where, {field: line}


def _numbered_lines(file: str) -> Iterator[tuple[str, str]]:
    """(name, line without its end). Raises DataError for a file that can't be read, or is not UTF-8."""
    name = "standard input" if file == "-" else file
    number = 0
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield f"{name}:{number}", line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{number}: is not UTF-8 ({error})") from error
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error.strerror})") from error


def _text_of(where: str, record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        actual = f"{name}={value!r}" if name in record else f"has no field {name}, only {', '.join(record)}"
        raise DataError(f"{where}: {actual}; it must be a text (--fields names others)")
    return value


@contextlib.contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that replaces `path` once it is complete."""
    if path is None:
        yield sys.stdout
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    run_command(lambda: run_prediction(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
