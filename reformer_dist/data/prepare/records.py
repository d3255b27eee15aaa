"""Samples of several fields from parallel text, records (JSON, CSV) and SQuAD files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from reformer_dist.data.format.label_spans import are_spans
from reformer_dist.data.prepare.columns import saved_table_files
from reformer_dist.data.prepare.formats import RECORD_SUFFIXES, iterate_records, record_suffix, text_fields
from reformer_dist.data.prepare.raw_files import open_raw
from reformer_dist.data.prepare.samples import RawSample
from reformer_dist.errors import DataError


def read_parallel(source: Path, target: Path) -> Iterator[RawSample]:
    """Pairs of line n of both files. Raises DataError if one has fewer lines than the other."""
    with open_raw(source) as sources, open_raw(target) as targets:
        for number, (source_line, target_line) in enumerate(zip_longest(sources, targets), start=1):
            if source_line is None or target_line is None:
                shorter, longer = (source, target) if source_line is None else (target, source)
                expected = f"line {number} of {longer} has no counterpart; both must have as many lines"
                raise DataError(f"{shorter}: ends after {number - 1} lines; {expected}")
            fields = (source_line.strip(), target_line.strip())
            yield RawSample(f"{source.name}:{number}", fields, split_key=fields[0])


def read_records(paths: Iterable[Path], fields: Sequence[str], label: str | None = None) -> Iterator[RawSample]:
    """One sample per record of files of records (.jsonl, .json, .csv, .parquet, ...), or of folders of such files.

    fields: names of its texts. label: name of its class.

    Raises DataError if a record lacks one of them.
    """
    names = [*fields, label] if label else fields
    for path, number, record in _read_files(paths, names):
        values = text_fields(record, names, f"{path}:{number}")
        texts = tuple(values[: len(fields)])
        metadata = {"label": values[-1].decode()} if label else {}
        yield RawSample(f"{path.name}:{number}", texts, metadata, split_key=texts[0])


def read_labeled(paths: Iterable[Path], field: str, spans: str) -> Iterator[RawSample]:
    """One text per record, as `read_records`, with the spans of characters [first, last + 1] to be predicted.

    field, spans: names of the text and the list of spans. Raises DataError if a record lacks one of them.
    """
    for path, number, record in _read_files(paths, [field, spans]):
        where = f"{path}:{number}"
        [text] = text_fields(record, [field], where)
        marked = _byte_spans(record, spans, text.decode(), where)
        yield RawSample(f"{path.name}:{number}", (text,), label_spans=marked)


def _read_files(paths: Iterable[Path], names: Sequence[str]) -> Iterator[tuple[Path, int, Any]]:
    """(file, line or number, record) of each record of files, and of the files of record formats in folders."""
    for path in paths:
        for file_path in _record_files(path) if path.is_dir() else [path]:
            with open_raw(file_path) as file:
                records = iterate_records(file, record_suffix(file_path.name), str(file_path), names)
                yield from ((file_path, number, record) for number, record in records)


def _record_files(folder: Path) -> list[Path]:
    saved = saved_table_files(folder)
    found = sorted(path for path in folder.rglob("*") if record_suffix(path.name)) if saved is None else saved
    if not found:
        raise DataError(
            f"{folder}: holds no file of records; their names must end in {', '.join(RECORD_SUFFIXES)}"
        )
    return found


def _byte_spans(record: Mapping[str, Any], name: str, text: str, where: str) -> tuple[tuple[int, int], ...]:
    values = record.get(name)
    if not values or not are_spans(values, len(text)):
        expected = f"must be pairs [first, last + 1] of characters of the text, up to {len(text)}"
        raise DataError(f"{where}: field {name!r} is {values!r:.80}; it {expected}")
    return tuple((len(text[:start].encode()), len(text[:stop].encode())) for start, stop in values)


def read_squad(paths: Iterable[Path]) -> Iterator[RawSample]:
    """Questions of SQuAD 1.1 files as (question, context).

    Metadata: `id`, and `answers`, each [first byte in the context, text]. Raises DataError if a file has another
    format or an answer is not at its offset.
    """
    for path in paths:
        with open_raw(path) as file:
            content = file.read()
        try:
            for article in json.loads(content)["data"]:
                for paragraph in article["paragraphs"]:
                    for question in paragraph["qas"]:
                        yield _squad_sample(question, str(paragraph["context"]), path)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is not in SQuAD's format ({type(error).__name__}: {error})") from error


def _squad_sample(question: Mapping[str, Any], context: str, path: Path) -> RawSample:
    where = f"{path}: question {question['id']}"
    answers = []
    for answer in question["answers"]:
        text, start = str(answer["text"]), int(answer["answer_start"])
        if not text or context[start : start + len(text)] != text:
            actual = f"the context has {context[start : start + len(text)]!r} there"
            raise DataError(f"{where}: its answer {text!r} is not at {start}; {actual}")
        answers.append([len(context[:start].encode()), text])
    if not answers:
        raise DataError(f"{where}: has no answer; in SQuAD 1.1 every question must have one")
    fields = (str(question["question"]).strip().encode(), context.encode())
    metadata = {"id": question["id"], "answers": answers}
    return RawSample(f"{path.name}:{question['id']}", fields, metadata, split_key=fields[1])
