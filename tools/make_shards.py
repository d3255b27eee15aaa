#!/usr/bin/env python3
"""Turns text into a data set that the trainer reads: tokenized tar shards, split into train and held-out."""

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
    SPLITS,
    TEXT_FIELDS,
    BpeTokenizer,
    ByteTokenizer,
    SkippedFiles,
    RawSample,
    Tokenizer,
    WriteSummary,
    read_documents,
    load_tokenizer,
    read_jsonl,
    read_parallel,
    read_squad,
    assign_splits,
    write_samples,
)
from reformer_dist.errors import DataError, UserError
from reformer_dist.process.stdio import quietly

EPILOG = """\
inputs:
  a folder       each file in it is a document, or several, as below; hidden and binary files are left out
  a .jsonl file  each line is a document: a JSON object with the text in field `text` (or --jsonl-field)
  a .tar file    each .txt in it is a document, and field `text` of each .json: shards in WebDataset's layout
  a text file    is cut at blank lines into some 64 documents of 2 to 64 KiB
  a .gz file     is read as what it holds; .tgz is .tar.gz

samples of several texts, for tasks other than a language model:
  --source F --target F       parallel text, a sample in each line: translations
  INPUT.jsonl --fields A B    fields of each line, such as document and summary; --label for a class
  INPUT.json --squad          questions, and the contexts that hold the answers

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
        form.left_out.clear()  # what a tokenizer did not learn from is met again
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
                labels=sorted({record.facts["label"] for record in form.records()}) if arguments.label else (),
            )
    except UserError as error:
        print(f"make_shards.py: error: {error}", file=sys.stderr)
        return 1
    show(summary, form.left_out, tokenizer, arguments.output)
    return 0


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Takes back the folders that were made within, where what is done there fails or is interrupted."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        for path in made[1:]:
            with suppress(OSError):  # something else may be in it by now
                path.rmdir()
        raise


@dataclass(frozen=True)
class InputFormat:
    """How the inputs are read, as often as it takes."""

    fields: tuple[str, ...]
    records: Callable[[], Iterator[RawSample]]
    heldout: Callable[[], Iterator[RawSample]] | None
    """What is held out, where that is given apart."""
    left_out: SkippedFiles
    """What the records so far had no place for."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> InputFormat:
        """Raises DataError where a file is missing."""
        given: list[Path] = arguments.heldout_from
        left_out = SkippedFiles()
        if arguments.source:
            read: Callable[..., Iterator[RawSample]] = read_parallel
            pairs: list[tuple[Any, ...]] = [(arguments.source, arguments.target), tuple(given)]
            fields = ("source", "target")
        elif arguments.squad:
            read, pairs, fields = read_squad, [(arguments.inputs,), (given,)], ("question", "context")
        elif arguments.fields:
            fields = tuple(arguments.fields)
            read = partial(read_jsonl, fields=fields, label=arguments.label)
            pairs = [(arguments.inputs,), (given,)]
        else:
            read = partial(
                read_text, suffixes=arguments.suffix, jsonl_field=arguments.jsonl_field, left_out=left_out
            )
            pairs, fields = [(arguments.inputs,), (given,)], TEXT_FIELDS
        return cls(fields, partial(read, *pairs[0]), partial(read, *pairs[1]) if given else None, left_out)


def read_text(paths: list[Path], suffixes: list[str], jsonl_field: str, left_out: SkippedFiles) -> Iterator[RawSample]:
    return (RawSample(name, (text,)) for name, text in read_documents(paths, suffixes, jsonl_field, left_out))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help="files and folders that hold the text")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the data set")
    add("--source", type=Path, metavar="FILE", help="parallel text: line by line what --target is written for")
    add("--target", type=Path, metavar="FILE", help="parallel text: as many lines as --source")
    add("--fields", nargs="+", metavar="NAME", help="fields of each line of .jsonl that are its texts, in order")
    add("--label", metavar="NAME", help="--fields: the field that says how the text is to be classified")
    add("--squad", action="store_true", help="inputs are in SQuAD's format, version 1.1")
    add(
        "--heldout-from",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="hold this out, in the form of the inputs (for parallel text: source and target), and nothing else",
    )
    add(
        "--tokenizer",
        choices=("bytes", "bpe"),
        default="bytes",
        help="bytes: 257 tokens; bpe: merges (default: bytes)",
    )
    add(
        "--tokenizer-file",
        type=Path,
        metavar="F",
        help="bpe: use this tokenizer.json instead of learning one",
    )
    add("--tokenizer-of", type=Path, metavar="M", help="that of a model: a run, a checkpoint or an export")
    add("--vocab-size", type=int, metavar="N", help="bpe: tokens to learn (default: 8192)")
    add(
        "--suffix",
        action="append",
        default=[],
        metavar=".EXT",
        help="take only such files of folders; may be repeated",
    )
    add("--shard-mb", type=float, default=16.0, metavar="F", help="size of a shard in MiB (default: 16)")
    add("--heldout", type=float, default=0.05, metavar="F", help="share of documents held out (default: 0.05)")
    add("--jsonl-field", default="text", metavar="NAME", help="field that holds the text (default: text)")
    add("--overwrite", action="store_true", help="replace the data set that DIR holds")
    arguments = parser.parse_args()
    problem = check_arguments(arguments)
    if problem:
        parser.error(problem)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the arguments together, if anything is."""
    is_parallel = arguments.source is not None or arguments.target is not None
    checks = {
        f"--heldout {arguments.heldout}: must be at least 0 and below 1": 0 <= arguments.heldout < 1,
        f"--shard-mb {arguments.shard_mb}: must be above 0 and finite": 1 <= arguments.shard_mb * 2**20 < math.inf,
        "--source and --target go together": (arguments.source is None) == (arguments.target is None),
        "give either inputs or --source and --target": is_parallel != bool(arguments.inputs),
        "--source, --fields and --squad exclude one another": is_parallel
        + bool(arguments.fields)
        + arguments.squad
        <= 1,
        "--label needs --fields": not arguments.label or bool(arguments.fields),
        "--heldout-from needs two files, source and target, with --source": not is_parallel
        or len(arguments.heldout_from) in (0, 2),
        "--tokenizer-of takes no --tokenizer and --tokenizer-file beside it": not arguments.tokenizer_of
        or (arguments.tokenizer == "bytes" and not arguments.tokenizer_file),
        "--tokenizer-file and --vocab-size need --tokenizer bpe": arguments.tokenizer == "bpe"
        or not (arguments.tokenizer_file or arguments.vocab_size),
        "--vocab-size is for learning a tokenizer; --tokenizer-file has one": not (
            arguments.tokenizer_file and arguments.vocab_size
        ),
    }
    return next((words for words, is_fine in checks.items() if not is_fine), None)


def choose_tokenizer(arguments: argparse.Namespace, form: InputFormat) -> Tokenizer:
    if arguments.tokenizer_of:
        from reformer_dist.checkpoint.weights import open_weights  # loads torch

        weights = open_weights(arguments.tokenizer_of)
        tokenizer = load_tokenizer(weights.run["tokenizer"], weights.folder)
        if arguments.squad and not tokenizer.is_lossless:
            right = "answers would no longer stand where --squad says; take --tokenizer bytes or bpe"
            raise DataError(f"--tokenizer-of {arguments.tokenizer_of}: SentencePiece normalises texts: {right}")
        return tokenizer
    if arguments.tokenizer == "bytes":
        return ByteTokenizer()
    if arguments.tokenizer_file:
        return BpeTokenizer.load(arguments.tokenizer_file)
    # held-out text teaches the tokenizer nothing either
    training = assign_splits(form.records(), () if form.heldout else None, arguments.heldout)
    texts = (text for split, record in training if split == "train" for text in record.fields)
    return BpeTokenizer.train(texts, arguments.vocab_size or 8192)


def show(summary: WriteSummary, left_out: SkippedFiles, tokenizer: Tokenizer, folder: Path) -> None:
    print(f"{folder}: vocabulary of {tokenizer.vocab_size} tokens")
    for split in SPLITS:
        numbers = {name: summary.total(name, split) for name in ("samples", "text_bytes", "tokens")}
        print(
            f"  {split:8} {numbers['samples']:>10,} documents  {numbers['text_bytes']:>14,} bytes  "
            f"{numbers['tokens']:>14,} tokens  {len(summary.splits[split]):>6,} shards"
        )
    share = summary.total("text_bytes", "heldout") / summary.total("text_bytes")
    print(f"  held out: {share:.1%} of the text")
    if summary.empty:
        print(f"  left out: {summary.empty:,} documents that, or one of whose fields, are empty")
    for kind, (count, first) in left_out.items():
        print(f"  left out: {count:,} {kind}, such as {first}")
    if summary.replaced:
        how = "replaced: bytes that are not UTF-8, in" if tokenizer.is_lossless else "normalised by SentencePiece:"
        print(f"  {how} {summary.replaced:,} documents")


if __name__ == "__main__":
    with quietly():
        sys.exit(main())
