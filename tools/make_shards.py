#!/usr/bin/env python3
"""Turns text into a data set that the trainer reads: tokenized tar shards, split into train and held-out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from reformer_dist.data import (
    SPLITS,
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    WriteSummary,
    is_heldout,
    iterate_documents,
    write_dataset,
)
from reformer_dist.errors import DataError

EPILOG = """\
inputs:
  a folder       each file in it is a document; hidden and binary files are left out
  a .jsonl file  each line is a document: a JSON object with the text in field `text` (or --jsonl-field)
  a .tar file    each .txt in it is a document, and field `text` of each .json: shards in WebDataset's layout
  a text file    is cut at blank lines into some 64 documents of 2 to 64 KiB
  a .gz file     is read as what it holds

examples:
  python tools/make_shards.py book.txt --output data/book
  python tools/make_shards.py src/ --suffix .py --suffix .md --output data/code --shard-mb 1
  python tools/make_shards.py corpus.jsonl.gz --tokenizer bpe --vocab-size 8192 --output data/corpus
"""


def main() -> int:
    arguments = parse_arguments()
    try:
        tokenizer = choose_tokenizer(arguments)
        summary = write_dataset(
            documents(arguments),
            arguments.output,
            tokenizer,
            shard_bytes=int(arguments.shard_mb * 2**20),
            heldout_fraction=arguments.heldout,
            overwrite=arguments.overwrite,
        )
    except DataError as error:
        print(f"make_shards.py: error: {error}", file=sys.stderr)
        return 1
    show(summary, tokenizer, arguments.output)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="files and folders that hold the text")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the data set")
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
    if arguments.tokenizer == "bytes" and (arguments.tokenizer_file or arguments.vocab_size):
        parser.error("--tokenizer-file and --vocab-size need --tokenizer bpe")
    if arguments.tokenizer_file and arguments.vocab_size:
        parser.error("--vocab-size is for learning a tokenizer; --tokenizer-file has one")
    return arguments


def documents(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    return iterate_documents(arguments.inputs, arguments.suffix, arguments.jsonl_field)


def choose_tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    if arguments.tokenizer == "bytes":
        return ByteTokenizer()
    if arguments.tokenizer_file:
        return BpeTokenizer.load(arguments.tokenizer_file)
    # held-out text teaches the tokenizer nothing either
    texts = (text for _, text in documents(arguments) if not is_heldout(text, arguments.heldout))
    return BpeTokenizer.train(texts, arguments.vocab_size or 8192)


def show(summary: WriteSummary, tokenizer: Tokenizer, folder: Path) -> None:
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
        print(f"  left out: {summary.empty:,} empty documents")
    if summary.replaced:
        print(f"  replaced: bytes that are not UTF-8, in {summary.replaced:,} documents")


if __name__ == "__main__":
    sys.exit(main())
