"""Samples of several fields from parallel text, JSON lines and SQuAD files."""

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
    """A sample before tokenization."""

    name: str
    """File and line, or another identification of its origin."""
    fields: tuple[bytes, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Data that is not text, as JSON values."""
    split_key: bytes | None = None
    """Samples with the same key are in the same split; None for the fields themselves."""


def read_parallel(source: Path, target: Path) -> Iterator[RawSample]:
    """Line n of one file with line n of the other. Raises DataError if one ends before the other."""
    with _open(source) as sources, _open(target) as targets:
        for number, (first, second) in enumerate(zip_longest(sources, targets), start=1):
            if first is None or second is None:
                ended, other = (source, target) if first is None else (target, source)
                right = f"line {number} of {other} has no counterpart; both must have as many lines"
                raise DataError(f"{ended}: ends after {number - 1} lines; {right}")
            fields = (first.strip(), second.strip())
            yield RawSample(f"{source.name}:{number}", fields, split_key=fields[0])


def read_jsonl(paths: Iterable[Path], fields: Sequence[str], label: str | None = None) -> Iterator[RawSample]:
    """One sample per line, a JSON object. fields: names of its texts. label: name of its class.

    Raises DataError if a line lacks one of them.
    """
    for path in paths:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, path, number, fields, label)


def read_squad(paths: Iterable[Path]) -> Iterator[RawSample]:
    """Questions of SQuAD 1.1 files as (question, context).

    Metadata: `id`, and `answers`, each [first byte in the context, text]. Raises DataError if a file has another
    format or an answer is not at its offset.
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
            raise DataError(f"{where}: its answer {text!r} is not at {start}; {right}")
        answers.append([len(context[:start].encode()), text])
    if not answers:
        raise DataError(f"{where}: has no answer; in SQuAD 1.1 every question must have one")
    fields = (str(question["question"]).strip().encode(), context.encode())
    return RawSample(
        f"{path.name}:{question['id']}", fields, {"id": question["id"], "answers": answers}, fields[1]
    )


def _parse_line(line: bytes, path: Path, number: int, fields: Sequence[str], label: str | None) -> RawSample:
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error}); it must be a JSON object") from error
    names = [*fields, *([label] if label else [])]
    for name in names:
        if isinstance(record, dict) and name not in record:
            others = f", but {', '.join(record)}" if record else ""
            raise DataError(f"{where}: has no field {name!r}{others}")
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise DataError(f"{where}: field {name!r} is {value!r}; it must be a string")
    # JSON can encode an unpaired surrogate, which UTF-8 can't
    texts = tuple(record[name].encode("utf-8", errors="replace") for name in fields)
    metadata = {"label": record[label]} if label else {}
    return RawSample(f"{path.name}:{number}", texts, metadata, texts[0])


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        # gzip's reader implements all that is used of IO[bytes], but is not typed so
        with cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read ({error})") from error
