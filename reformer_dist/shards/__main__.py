"""reformer-shards: converts raw files to a dataset for training, tar shards with train and held-out splits."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from reformer_dist.data import (
    DNA,
    SPLITS,
    BpeTokenizer,
    ByteTokenizer,
    FillInMiddle,
    IdTokenizer,
    SkippedFiles,
    TextMember,
    Tokenizer,
    WriteSummary,
    assign_splits,
    has_finished_work,
    index_tar_files,
    load_tokenizer,
    open_vocabulary,
    sample_texts,
    write_samples,
)
from reformer_dist.errors import DataError
from reformer_dist.process.command import run_command
from reformer_dist.process.cores import usable_cores
from reformer_dist.process.live_line import live
from reformer_dist.shards.arguments import parse_arguments
from reformer_dist.shards.inputs import InputFormat
from reformer_dist.shards.progress import input_bytes, progress

SERIAL_BYTES = 32 << 20  # of input that one process tokenizes before others would have started
VOCABULARY_BYTES = 512 << 20  # of text from which a vocabulary is learned


def make_shards() -> None:
    """Writes the dataset that the arguments of the command line describe. Raises UserError."""
    arguments = parse_arguments()
    form = InputFormat.of(arguments)
    total = input_bytes(form.paths)
    workers = arguments.workers
    if workers is None:
        workers = usable_cores() if total > SERIAL_BYTES and usable_cores() > 1 else 0
    tokenizer = choose_tokenizer(arguments, form, total)
    require_offsets(arguments, tokenizer)
    form.left_out.clear()  # the tokenizer's pass over the inputs has counted them already
    with removed_on_failure(arguments.output), progress("tokenizing", total) as shown:
        write = index_in_place if arguments.in_place else write_shards
        summary = write(arguments, form, tokenizer, workers, shown.add)
    show(summary, form.left_out, tokenizer, arguments.output)
    print(f"  {shown.rate:.1f} MB of text per second")


def write_shards(
    arguments: argparse.Namespace,
    form: InputFormat,
    tokenizer: Tokenizer,
    workers: int,
    on_read: Callable[[int], None],
) -> WriteSummary:
    records = form.records()
    if arguments.fim:
        reordered = FillInMiddle(arguments.fim, tuple(arguments.fim_tokens))
        reordered.token_ids(tokenizer)  # raises an error at once
        records = (replace(record, fill_in_middle=reordered) for record in records)
    return write_samples(
        records,
        arguments.output,
        tokenizer,
        shard_bytes=int(arguments.shard_mb * 2**20),
        heldout_fraction=arguments.heldout,
        overwrite=arguments.overwrite,
        heldout=form.heldout() if form.heldout else None,
        fields=form.fields,
        label_spans=bool(arguments.label_spans),
        labels=None if arguments.label else (),
        alphabet=DNA if arguments.fasta and isinstance(tokenizer, ByteTokenizer) else None,
        workers=workers,
        resume=True,
        on_read=on_read,
    )


def index_in_place(
    arguments: argparse.Namespace,
    form: InputFormat,
    tokenizer: Tokenizer,
    workers: int,
    on_read: Callable[[int], None],
) -> WriteSummary:
    return index_tar_files(
        arguments.inputs,
        arguments.output,
        tokenizer,
        TextMember.of(arguments.member, arguments.text_field or "text"),
        heldout=arguments.heldout_from,
        heldout_fraction=arguments.heldout,
        skip_others=arguments.skip_unreadable,
        overwrite=arguments.overwrite,
        workers=workers,
        on_read=on_read,
    )


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Removes the folders created in this context if it fails, unless they hold work that can be continued."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if has_finished_work(folder):
            print(f"{folder}/.writing keeps what is done; the same command goes on from there", file=sys.stderr)
            raise
        if created:
            shutil.rmtree(folder, ignore_errors=True)
        for path in created[1:]:
            with suppress(OSError):  # may contain other files by now
                path.rmdir()
        raise


def choose_tokenizer(arguments: argparse.Namespace, form: InputFormat, total_bytes: int) -> Tokenizer:
    if arguments.tokenizer_of:
        from reformer_dist.checkpoint.export import open_weights  # loads torch

        weights = open_weights(arguments.tokenizer_of)
        return load_tokenizer(weights.record.tokenizer, weights.folder)
    if arguments.ids:
        return IdTokenizer(arguments.ids)
    if arguments.tokenizer == "bytes":
        return ByteTokenizer()
    if arguments.tokenizer_file:
        special = arguments.special_tokens
        return open_vocabulary(
            arguments.tokenizer_file,
            arguments.eot_token,
            use_special_tokens=special,
            special_tokens=arguments.add_special_token,
            split=arguments.split_regex,
        )
    with progress("reading for the vocabulary", total_bytes) as shown:
        # the tokenizer is not trained on held-out text
        training = assign_splits(form.records(), () if form.heldout else None, arguments.heldout)
        texts = (text for split, record in training if split == "train" for text in record.fields)
        sampled = sample_texts(shown.counted(texts), VOCABULARY_BYTES)
    with live.shown(), live.phase("training the tokenizer"):
        special = [*arguments.add_special_token, *(arguments.fim_tokens if arguments.fim else ())]
        return BpeTokenizer.train(sampled, arguments.vocab_size or 8192, special)


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


def main() -> None:
    run_command(make_shards)


if __name__ == "__main__":
    main()
