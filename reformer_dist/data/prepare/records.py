"""Samples of several fields from the files that people keep them in: parallel text, JSON lines, SQuAD's JSON."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, cast

from reformer_dist.errors import DataError


@dataclass(frozen=True)
class RawSample:
    """A sample before it is tokenized."""

    name: str
    """File and line, or whatever else finds it again."""
    fields: tuple[bytes, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to it that is no text, as JSON values."""
    split_key: bytes | None = None
    """Records that share it are held out together; None: those of the same fields."""


def read_parallel(source: Path, target: Path) -> Iterator[RawSample]:
    """Line n of one file with line n of the other. Raises DataError where one ends before the other."""
    with _open(source) as sources, _open(target) as targets:
        for number, (first, second) in enumerate(zip_longest(sources, targets), start=1):
            if first is None or second is None:
                ended, other = (source, target) if first is None else (target, source)
                right = f"line {number} of {other} has no counterpart; both must have as many lines"
                raise DataError(f"{ended}: ends after {number - 1} lines; {right}")
            fields = (first.strip(), second.strip())
            yield RawSample(f"{source.name}:{number}", fields, split_key=fields[0])


def read_jsonl(paths: Iterable[Path], fields: Sequence[str], label: str | None = None) -> Iterator[RawSample]:
    """Each line is a JSON object; `fields` name its texts, `label` what it is to be classified as.

    Raises DataError where a line lacks one of them.
    """
    for path in paths:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _of_line(line, path, number, fields, label)


def read_squad(paths: Iterable[Path]) -> Iterator[RawSample]:
    """Questions of files in SQuAD's format, version 1.1, as (question, context).

    Facts: `id`, and `answers`, each [first byte in the context, text]. Raises DataError where a file is of another
    format or an answer does not stand where it says.
    """
    for path in paths:
        with _open(path) as file:
            content = file.read()
        try:
            articles = json.loads(content)["data"]
            for article in articles:
                for paragraph in article["paragraphs"]:
                    for question in paragraph["qas"]:
                        yield _question(question, str(paragraph["context"]), path)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is not in SQuAD's format ({type(error).__name__}: {error})") from error


def _question(question: Mapping[str, Any], context: str, path: Path) -> RawSample:
    where = f"{path}: question {question['id']}"
    answers = []
    for answer in question["answers"]:
        text, start = str(answer["text"]), int(answer["answer_start"])
        if not text or context[start : start + len(text)] != text:
            right = f"the context has {context[start : start + len(text)]!r} there"
            raise DataError(f"{where}: its answer {text!r} is said to stand at {start}; {right}")
        answers.append([len(context[:start].encode()), text])
    if not answers:
        raise DataError(f"{where}: has no answer; questions without one are not of SQuAD 1.1")
    fields = (str(question["question"]).strip().encode(), context.encode())
    return RawSample(f"{path.name}:{question['id']}", fields, {"id": question["id"], "answers": answers}, fields[1])


def _of_line(line: bytes, path: Path, number: int, fields: Sequence[str], label: str | None) -> RawSample:
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error}); it must be a JSON object") from error
    wanted = [*fields, *([label] if label else [])]
    for name in wanted:
        if isinstance(record, dict) and name not in record:
            others = f", but {', '.join(record)}" if record else ""
            raise DataError(f"{where}: has no field {name!r}{others}")
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise DataError(f"{where}: field {name!r} is {value!r}; it must be a string")
    # JSON can spell half of a surrogate pair, which no UTF-8 text holds
    texts = tuple(record[name].encode("utf-8", errors="replace") for name in fields)
    facts = {"label": record[label]} if label else {}
    return RawSample(f"{path.name}:{number}", texts, facts, texts[0])


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        # gzip's reader has all that is used of IO[bytes], which its type doesn't say
        with cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read ({error})") from error
