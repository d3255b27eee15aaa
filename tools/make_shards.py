#!/usr/bin/env python3
"""Converts text to a dataset for training: tokenized tar shards with train and held-out splits."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reformer_dist.data import (
    RECORD_SUFFIXES,
    SECTION_BYTES,
    SPLITS,
    TEXT_FIELDS,
    BpeTokenizer,
    ByteTokenizer,
    RawSample,
    SkippedFiles,
    TextOptions,
    Tokenizer,
    WriteSummary,
    assign_splits,
    load_tokenizer,
    read_labeled,
    read_parallel,
    read_records,
    read_squad,
    read_text,
    write_samples,
)
from reformer_dist.errors import DataError, UserError
from reformer_dist.process.stdio import exit_quietly

EPILOG = """\
inputs:
  folder       each file is one or more documents, as below; hidden and binary files are skipped
  .jsonl, .ndjson, .json, .csv, .tsv   each record is a document, with the text in field or column `text`
               (or --text-field); a .json file holds an array of objects, or one after another
  .tar file    each .txt member and each record of members as above is a document (WebDataset shards)
  text file    one document, whose end is held out; above 8 MiB, one for every 4 to 8 MiB (or --section-mb)
  .gz file     decompressed and read as above; .tgz is .tar.gz
  other formats that hold text, such as .zst and .parquet, are refused (or skipped, with --skip-unreadable)

samples with several texts, for tasks other than language modeling:
  --source F --target F       parallel text, one sample per line: translation
  INPUT --fields A B          fields of each record, such as document and summary; --label for a class
  INPUT.jsonl --label-spans S   one text with the spans [[first, last + 1], ...] that are predicted, in characters
  INPUT.json --squad          questions and contexts in SQuAD format

examples:
  python tools/make_shards.py book.txt --output data/book
  python tools/make_shards.py src/ --suffix .py --suffix .md --output data/code --shard-mb 1
  python tools/make_shards.py --source train.en --target train.de --heldout-from test.en test.de \\
      --tokenizer bpe --vocab-size 4000 --output data/en-de
  python tools/make_shards.py corpus.jsonl.gz --tokenizer bpe --vocab-size 8192 --output data/corpus
"""


def main() -> int:
    arguments = parse_arguments()
    try:
        form = InputFormat.of(arguments)
        tokenizer = choose_tokenizer(arguments, form)
        require_offsets(arguments, tokenizer)
        form.left_out.clear()  # the tokenizer's pass over the inputs has counted them already
        with removed_on_failure(arguments.output):
            summary = write_samples(
                form.records(),
                arguments.output,
                tokenizer,
                shard_bytes=int(arguments.shard_mb * 2**20),
                heldout_fraction=arguments.heldout,
                overwrite=arguments.overwrite,
                heldout=form.heldout() if form.heldout else None,
                fields=form.fields,
                label_spans=bool(arguments.label_spans),
                labels=sorted({record.metadata["label"] for record in form.records()}) if arguments.label else (),
            )
    except UserError as error:
        print(f"make_shards.py: error: {error}", file=sys.stderr)
        return 1
    show(summary, form.left_out, tokenizer, arguments.output)
    return 0


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Removes the folders created in this context if it fails or is interrupted."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if created:
            shutil.rmtree(folder, ignore_errors=True)
        for path in created[1:]:
            with suppress(OSError):  # may contain other files by now
                path.rmdir()
        raise


@dataclass(frozen=True)
class InputFormat:
    """The fields of the inputs, and functions that iterate over their records."""

    fields: tuple[str, ...]
    records: Callable[[], Iterator[RawSample]]
    heldout: Callable[[], Iterator[RawSample]] | None
    """Held-out records, if given separately."""
    left_out: SkippedFiles
    """Counts of skipped inputs."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> InputFormat:
        """Raises DataError if a file is missing."""
        heldout_files: list[Path] = arguments.heldout_from
        left_out = SkippedFiles()
        if arguments.source:
            read: Callable[..., Iterator[RawSample]] = read_parallel
            pairs: list[tuple[Any, ...]] = [(arguments.source, arguments.target), tuple(heldout_files)]
            fields = ("source", "target")
        elif arguments.squad:
            read, pairs, fields = read_squad, [(arguments.inputs,), (heldout_files,)], ("question", "context")
        elif arguments.label_spans:
            read = partial(read_labeled, field=arguments.text_field, spans=arguments.label_spans)
            pairs, fields = [(arguments.inputs,), (heldout_files,)], TEXT_FIELDS
        elif arguments.fields:
            fields = tuple(arguments.fields)
            read = partial(read_records, fields=fields, label=arguments.label)
            pairs = [(arguments.inputs,), (heldout_files,)]
        else:
            read = partial(read_text, options=text_options(arguments), skipped=left_out)
            pairs, fields = [(arguments.inputs,), (heldout_files,)], TEXT_FIELDS
        return cls(fields, partial(read, *pairs[0]), partial(read, *pairs[1]) if heldout_files else None, left_out)


def text_options(arguments: argparse.Namespace) -> TextOptions:
    return TextOptions(
        suffixes=tuple(arguments.suffix),
        text_field=arguments.text_field,
        as_text=tuple(arguments.as_text),
        skip_packed=arguments.skip_unreadable,
        section_bytes=int(arguments.section_mb * 2**20),
        output=arguments.output,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help="text files and folders")
    add("--output", required=True, type=Path, metavar="DIR", help="output folder of the dataset")
    add("--source", type=Path, metavar="FILE", help="parallel text: source lines")
    add("--target", type=Path, metavar="FILE", help="parallel text: target lines, as many as in --source")
    add("--fields", nargs="+", metavar="NAME", help="text fields of each .jsonl line, in order")
    add("--label", metavar="NAME", help="with --fields: the field with the class label")
    add("--label-spans", metavar="NAME", help="field of .jsonl lines: spans of the text that are predicted")
    add("--squad", action="store_true", help="inputs are in SQuAD 1.1 format")
    add(
        "--heldout-from",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="held-out files, in the format of the inputs (parallel text: source and target); replaces --heldout",
    )
    add(
        "--tokenizer",
        choices=("bytes", "bpe"),
        default="bytes",
        help="bytes: 257 tokens; bpe: byte pair encoding (default: bytes)",
    )
    add(
        "--tokenizer-file",
        type=Path,
        metavar="F",
        help="bpe: use this tokenizer.json instead of training one",
    )
    add(
        "--eot-token",
        metavar="T",
        help="with --tokenizer-file: the token that ends documents (default: eos_token of a tokenizer_config.json "
        "next to it, else <|endoftext|>)",
    )
    add(
        "--special-tokens",
        action="store_true",
        help="with --tokenizer-file: encode the text of its special tokens, except the one that ends documents, "
        "as these tokens (default: as plain text)",
    )
    add("--tokenizer-of", type=Path, metavar="M", help="use the tokenizer of a run, checkpoint or export")
    add("--vocab-size", type=int, metavar="N", help="bpe: vocabulary size to train (default: 8192)")
    add(
        "--suffix",
        action="append",
        default=[],
        metavar=".EXT",
        help="only read files with this suffix in folders; may be repeated",
    )
    add("--shard-mb", type=float, default=16.0, metavar="F", help="size of a shard in MiB (default: 16)")
    add("--heldout", type=float, default=0.05, metavar="F", help="held-out fraction of documents (default: 0.05)")
    add("--text-field", default="text", metavar="NAME", help="field or column of the text (default: text)")
    add("--jsonl-field", dest="renamed", help=argparse.SUPPRESS)
    add(
        "--as-text",
        action="append",
        default=[],
        choices=RECORD_SUFFIXES,
        help="read files with this suffix as plain text, such as the .json files of source code; may be repeated",
    )
    add(
        "--skip-unreadable",
        action="store_true",
        help="leave out files in formats that can't be read, and count them",
    )
    add(
        "--section-mb",
        type=float,
        default=SECTION_BYTES / 2**20,
        metavar="F",
        help="a text file given by itself is one document for every F to 2F MiB: order within a document is kept, "
        "documents are shuffled (default: 4)",
    )
    add("--overwrite", action="store_true", help="replace an existing dataset in DIR")
    arguments = parser.parse_args()
    problem = check_arguments(arguments)
    if problem:
        parser.error(problem)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> str | None:
    """The first invalid combination of arguments, if any."""
    is_parallel = arguments.source is not None or arguments.target is not None
    checks = {
        f"--jsonl-field {arguments.renamed}: is now --text-field": arguments.renamed is None,
        f"--section-mb {arguments.section_mb}: must be from 0.001 to 512": 0.001 <= arguments.section_mb <= 512,
        f"--heldout {arguments.heldout}: must be at least 0 and below 1": 0 <= arguments.heldout < 1,
        f"--shard-mb {arguments.shard_mb}: must be above 0 and finite": 1 <= arguments.shard_mb * 2**20 < math.inf,
        "--source and --target go together": (arguments.source is None) == (arguments.target is None),
        "give either inputs or --source and --target": is_parallel != bool(arguments.inputs),
        "--source, --fields, --label-spans and --squad are mutually exclusive": is_parallel
        + bool(arguments.fields)
        + bool(arguments.label_spans)
        + arguments.squad
        <= 1,
        "--label needs --fields": not arguments.label or bool(arguments.fields),
        "--heldout-from needs two files, source and target, with --source": not is_parallel
        or len(arguments.heldout_from) in (0, 2),
        "--tokenizer-of excludes --tokenizer and --tokenizer-file": not arguments.tokenizer_of
        or (arguments.tokenizer == "bytes" and not arguments.tokenizer_file),
        "--tokenizer-file and --vocab-size need --tokenizer bpe": arguments.tokenizer == "bpe"
        or not (arguments.tokenizer_file or arguments.vocab_size),
        "--eot-token and --special-tokens need --tokenizer-file": bool(arguments.tokenizer_file)
        or not (arguments.eot_token or arguments.special_tokens),
        "--vocab-size is for training a tokenizer; --tokenizer-file is already trained": not (
            arguments.tokenizer_file and arguments.vocab_size
        ),
    }
    return next((problem for problem, is_valid in checks.items() if not is_valid), None)


def choose_tokenizer(arguments: argparse.Namespace, form: InputFormat) -> Tokenizer:
    if arguments.tokenizer_of:
        from reformer_dist.checkpoint.export import open_weights  # loads torch

        weights = open_weights(arguments.tokenizer_of)
        return load_tokenizer(weights.record.tokenizer, weights.folder)
    if arguments.tokenizer == "bytes":
        return ByteTokenizer()
    if arguments.tokenizer_file:
        special = arguments.special_tokens
        return BpeTokenizer.load(arguments.tokenizer_file, arguments.eot_token, use_special_tokens=special)
    # the tokenizer is not trained on held-out text
    training = assign_splits(form.records(), () if form.heldout else None, arguments.heldout)
    texts = (text for split, record in training if split == "train" for text in record.fields)
    return BpeTokenizer.train(texts, arguments.vocab_size or 8192)


def require_offsets(arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Raises DataError if labels that are offsets in the text would be shifted."""
    option = "--squad" if arguments.squad else "--label-spans" if arguments.label_spans else None
    if option and not tokenizer.is_lossless:
        source = "--tokenizer-of" if arguments.tokenizer_of else "--tokenizer-file"
        problem = f"the tokenizer normalizes text, which shifts the offsets of {option}"
        path = arguments.tokenizer_of or arguments.tokenizer_file
        raise DataError(f"{source} {path}: {problem}; use --tokenizer bytes, or a byte-level BPE")


def show(summary: WriteSummary, left_out: SkippedFiles, tokenizer: Tokenizer, folder: Path) -> None:
    print(f"{folder}: vocabulary of {tokenizer.vocab_size} tokens")
    for split in SPLITS:
        numbers = {name: summary.total(name, split) for name in ("samples", "text_bytes", "tokens")}
        print(
            f"  {split:8} {numbers['samples']:>10,} documents  {numbers['text_bytes']:>14,} bytes  "
            f"{numbers['tokens']:>14,} tokens  {len(summary.splits[split]):>6,} shards"
        )
    fraction = summary.total("text_bytes", "heldout") / summary.total("text_bytes")
    print(f"  held out: {fraction:.1%} of the text")
    if summary.empty:
        print(f"  skipped: {summary.empty:,} documents with an empty text or field")
    for kind, (count, first) in left_out.items():
        print(f"  skipped: {count:,} {kind}, such as {first}")
    if summary.normalized:
        change = "replaced: invalid UTF-8 in" if tokenizer.is_lossless else "normalized by the tokenizer:"
        print(f"  {change} {summary.normalized:,} documents")


if __name__ == "__main__":
    with exit_quietly():
        sys.exit(main())
