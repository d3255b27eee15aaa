"""Arguments of `reformer-shards`, and their invalid combinations."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from reformer_dist.data import AS_TEXT_SUFFIXES, CASES, FILE_ORDERS, FIM_TOKENS, SECTION_BYTES
from reformer_dist.process.version import add_version

FORMS = ("fields", "label_spans", "squad", "fasta", "bytes", "ids", "in_place", "repository")
"""Arguments that say what the inputs are, besides --source; without one, documents of text."""
EPILOG = """\
inputs:
  folder       each file is one or more documents, as below; hidden and binary files are skipped
  .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow   each record is a document, with the text in field or
               column `text` (or --text-field); a .json file holds an array of objects, or one after another
  a data set saved to disk by Hugging Face's datasets   the same
  .tar file    each .txt member and each record of members as above is a document (WebDataset shards)
  text file    one document, whose end is held out; above 8 MiB, one for every 4 to 8 MiB (or --section-mb)
  .gz, .zst, .xz, .bz2   decompressed and read as above; .tgz is .tar.gz
  folder       with --repository: one document, its files one after another below their paths
  any file     with --bytes: the bytes that it holds, neither decompressed nor decoded
  .npy, .npz, .parquet, .arrow, .jsonl   with --ids N: sequences of token ids, such as codes of audio or music
  FASTA        with --fasta: each sequence without its long runs of N, or each region of a BED file
  .tar files, with --in-place   indexed where they are, without a copy
  other formats that hold text, such as .pdf and .zip, are refused (or skipped, with --skip-unreadable)

samples with several texts, for tasks other than language modeling:
  --source F --target F       parallel text, one sample per line: translation
  INPUT --fields A B          fields of each record, such as document and summary; --label for a class
  INPUT.jsonl --label-spans S   one text with the spans [[first, last + 1], ...] that are predicted, in characters
  INPUT.json --squad          questions and contexts in SQuAD format

examples:
  reformer-shards book.txt --output data/book
  reformer-shards src/ --suffix .py --suffix .md --output data/code --shard-mb 1
  reformer-shards --source train.en --target train.de --heldout-from test.en test.de \\
      --tokenizer bpe --vocab-size 4000 --output data/en-de
  reformer-shards corpus.jsonl.gz --tokenizer bpe --vocab-size 8192 --output data/corpus
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reformer-shards",
        description="Converts raw files to a dataset for training: tokenized tar shards, train and held-out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="files and folders")
    _add_output_options(parser.add_argument_group("output"))
    _add_text_options(parser.add_argument_group("documents"))
    _add_field_options(parser.add_argument_group("samples with several texts or labels"))
    _add_code_options(parser.add_argument_group("source code"))
    _add_fasta_options(parser.add_argument_group("DNA"))
    _add_tokenizer_options(parser.add_argument_group("tokenizer"))
    arguments = parser.parse_args()
    arguments.tokenizer = arguments.tokenizer or ("bpe" if arguments.tokenizer_file else "bytes")
    problem = check_arguments(arguments)
    if problem:
        parser.error(problem)
    return arguments


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", required=True, type=Path, metavar="DIR", help="output folder of the dataset")
    add("--overwrite", action="store_true", help="replace an existing dataset in DIR")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that tokenize (default: one per core, and none besides this one for small inputs)",
    )
    add("--shard-mb", type=float, default=16.0, metavar="F", help="size of a shard in MiB (default: 16)")
    add("--heldout", type=float, default=0.05, metavar="F", help="held-out fraction of documents (default: 0.05)")
    add(
        "--heldout-from",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="held-out files, in the format of the inputs (parallel text: source and target); replaces --heldout",
    )


def _add_text_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--text-field",
        metavar="NAME",
        help="field or column of the text (default: text), or of the ids of --ids (default: input_ids)",
    )
    add(
        "--in-place",
        action="store_true",
        help="inputs are .tar files of WebDataset: write indexes only, in DIR, and links to the files if they are "
        "elsewhere",
    )
    add(
        "--member",
        default="txt",
        metavar="SUFFIX",
        help="with --in-place: the member of each sample that holds its text; of .json members, --text-field",
    )
    add("--bytes", action="store_true", help="inputs are files of any kind, read as the bytes that they are")
    add(
        "--ids",
        type=int,
        metavar="N",
        help="inputs are token ids 0 to N - 1: .npy, .npz, or lists in records and columns",
    )
    add("--jsonl-field", dest="renamed", help=argparse.SUPPRESS)
    add(
        "--suffix",
        action="append",
        default=[],
        metavar=".EXT",
        help="only read files with this suffix in folders; may be repeated",
    )
    add(
        "--as-text",
        action="append",
        default=[],
        choices=AS_TEXT_SUFFIXES,
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


def _add_field_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--source", type=Path, metavar="FILE", help="parallel text: source lines")
    add("--target", type=Path, metavar="FILE", help="parallel text: target lines, as many as in --source")
    add("--fields", nargs="+", metavar="NAME", help="text fields of each record, in order")
    add("--label", metavar="NAME", help="with --fields: the field with the class label")
    add("--label-spans", metavar="NAME", help="field of records: spans of the text that are predicted")
    add("--squad", action="store_true", help="inputs are in SQuAD 1.1 format")


def _add_code_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--repository",
        action="store_true",
        help="each INPUT is a folder and one document, with paths as headers",
    )
    add(
        "--file-order",
        choices=FILE_ORDERS,
        default="path",
        help="with --repository: files by path, or after those that they import (default: path)",
    )
    add(
        "--fim",
        type=float,
        default=0.0,
        metavar="F",
        help="bpe: reorder this fraction of the training texts, or files of a repository, as prefix, suffix and "
        "middle, to learn to fill in the middle (default: 0)",
    )
    add(
        "--fim-tokens",
        nargs=3,
        default=FIM_TOKENS,
        metavar=("PREFIX", "SUFFIX", "MIDDLE"),
        help=f"special tokens before the three (default: {' '.join(FIM_TOKENS)})",
    )


def _add_fasta_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--fasta", action="store_true", help="inputs are FASTA files, one per species, or folders of them")
    add(
        "--bed",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="read only the regions of these BED files, one per INPUT; those on strand - are reversed",
    )
    add(
        "--case",
        choices=CASES,
        default="upper",
        help="upper: soft-masked (lower-case) bases are read as the others; keep: they stay lower case; "
        "mask: they become N (default: upper)",
    )
    add(
        "--max-n",
        type=int,
        default=10,
        metavar="N",
        help="a longer run of N ends a document and is left out (default: 10)",
    )
    add(
        "--heldout-chromosomes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="hold out the sequences of these names, such as chr8, 'mouse/chr1' or 'chr*_random'; "
        "replaces --heldout, which holds out whole sequences too",
    )


def _add_tokenizer_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tokenizer",
        choices=("bytes", "bpe"),
        help="bytes: 257 tokens; bpe: byte pair encoding, learned from the inputs (default: bytes)",
    )
    add("--vocab-size", type=int, metavar="N", help="bpe: vocabulary size to train (default: 8192)")
    add(
        "--tokenizer-file",
        type=Path,
        metavar="F",
        help="a tokenizer.json of Hugging Face, ranks of tiktoken, or a model of SentencePiece",
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
    add(
        "--add-special-token",
        action="append",
        default=[],
        metavar="T",
        help="bpe, --tokenizer-file: a special token of this name, if the vocabulary lacks it; may be repeated",
    )
    add(
        "--split-regex",
        metavar="R",
        help="ranks of tiktoken: the encoding (gpt2, cl100k_base, o200k_base) or regular expression that cuts "
        "text into words (default: that of the file's name)",
    )
    add("--tokenizer-of", type=Path, metavar="M", help="use the tokenizer of a run, checkpoint or export")


def check_arguments(arguments: argparse.Namespace) -> str | None:
    """The first invalid combination of arguments, if any."""
    checks = {**_check_inputs(arguments), **_check_formats(arguments), **_check_tokenizer(arguments)}
    return next((problem for problem, is_valid in checks.items() if not is_valid), None)


def _check_inputs(arguments: argparse.Namespace) -> dict[str, bool]:
    is_parallel = arguments.source is not None or arguments.target is not None
    n_forms = sum(map(bool, (is_parallel, *(getattr(arguments, name) for name in FORMS))))
    forms = ", ".join(f"--{name.replace('_', '-')}" for name in ("source", *FORMS))
    return {
        f"--jsonl-field {arguments.renamed}: is now --text-field": arguments.renamed is None,
        f"--section-mb {arguments.section_mb}: must be from 0.001 to 512": 0.001 <= arguments.section_mb <= 512,
        f"--heldout {arguments.heldout}: must be at least 0 and below 1": 0 <= arguments.heldout < 1,
        f"--workers {arguments.workers}: must be from 0 to 1024": 0 <= (arguments.workers or 0) <= 1024,
        f"--shard-mb {arguments.shard_mb}: must be above 0 and finite": 1 <= arguments.shard_mb * 2**20 < math.inf,
        "--source and --target go together": (arguments.source is None) == (arguments.target is None),
        "give either inputs or --source and --target": is_parallel != bool(arguments.inputs),
        f"{forms}: give one of them": n_forms <= 1,
        "--label needs --fields": not arguments.label or bool(arguments.fields),
        "--heldout-from needs two files, source and target, with --source": not is_parallel
        or len(arguments.heldout_from) in (0, 2),
        "--heldout-from and --heldout-chromosomes exclude each other": not (
            arguments.heldout_from and arguments.heldout_chromosomes
        ),
    }


def _check_formats(arguments: argparse.Namespace) -> dict[str, bool]:
    of_fasta = (arguments.bed, arguments.heldout_chromosomes, arguments.case != "upper", arguments.max_n != 10)
    ids = arguments.ids
    return {
        "--bed, --heldout-chromosomes, --case and --max-n need --fasta": arguments.fasta or not any(of_fasta),
        "--bed: give one file per INPUT": len(arguments.bed) in (0, len(arguments.inputs)),
        f"--max-n {arguments.max_n}: must be at least 0": 0 <= arguments.max_n < 2**31,
        f"--ids {ids}: must be from 1 to 4294967294": ids is None or 1 <= ids < 2**32 - 1,
        "--file-order needs --repository": arguments.repository or arguments.file_order == "path",
        "--member needs --in-place": arguments.in_place or arguments.member == "txt",
    }


def _check_tokenizer(arguments: argparse.Namespace) -> dict[str, bool]:
    is_bpe, file, other = arguments.tokenizer == "bpe", arguments.tokenizer_file, arguments.tokenizer_of
    has_texts = not any(getattr(arguments, name) for name in FORMS if name not in ("fasta", "repository"))
    return {
        "--bytes and --ids exclude --tokenizer and --tokenizer-of": not (arguments.bytes or arguments.ids)
        or not (is_bpe or other),
        "--in-place needs a vocabulary that exists: --tokenizer bytes, --tokenizer-file or --tokenizer-of": not (
            arguments.in_place and is_bpe and not file
        ),
        f"--fim {arguments.fim}: must be from 0 to 1": 0 <= arguments.fim <= 1,
        f"--fim {arguments.fim}: needs documents, or a repository, and --tokenizer bpe": not arguments.fim
        or (has_texts and arguments.source is None and bool(is_bpe or other)),
        "--tokenizer-of excludes --tokenizer and --tokenizer-file": not other or not (is_bpe or file),
        "--vocab-size needs --tokenizer bpe": is_bpe or not arguments.vocab_size,
        "--tokenizer-file excludes --tokenizer bytes": is_bpe or not file,
        "--eot-token and --special-tokens need --tokenizer-file": bool(file)
        or not (arguments.eot_token or arguments.special_tokens),
        "--add-special-token needs --tokenizer bpe or --tokenizer-file": is_bpe or not arguments.add_special_token,
        "--split-regex needs --tokenizer-file": arguments.split_regex is None or bool(file),
        "--vocab-size is for training a tokenizer; --tokenizer-file is already trained": not (
            file and arguments.vocab_size
        ),
    }
