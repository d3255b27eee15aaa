"""The inputs of `reformer-shards`: their fields, and functions that iterate over their records."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from reformer_dist.data import (
    TEXT_FIELDS,
    FastaOptions,
    RawSample,
    SkippedFiles,
    TextOptions,
    read_bytes,
    read_fasta,
    read_ids,
    read_labeled,
    read_parallel,
    read_records,
    read_repositories,
    read_squad,
    read_text,
)
from reformer_dist.errors import DataError


@dataclass(frozen=True)
class InputFormat:
    """The fields of the inputs, and functions that iterate over their records."""

    fields: tuple[str, ...]
    records: Callable[[], Iterator[RawSample]]
    heldout: Callable[[], Iterator[RawSample]] | None
    """Held-out records, if given separately."""
    left_out: SkippedFiles
    """Counts of skipped inputs."""
    paths: tuple[Path, ...]
    """All files and folders that are read."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> InputFormat:
        """Raises DataError if a file is missing."""
        heldout_files: list[Path] = arguments.heldout_from
        left_out = SkippedFiles()
        paths = (*(arguments.inputs or (arguments.source, arguments.target)), *heldout_files)
        if arguments.source:
            read: Callable[..., Iterator[RawSample]] = read_parallel
            pairs: list[tuple[Any, ...]] = [(arguments.source, arguments.target), tuple(heldout_files)]
            fields: tuple[str, ...] = ("source", "target")
        elif arguments.squad:
            read, pairs, fields = read_squad, [(arguments.inputs,), (heldout_files,)], ("question", "context")
        elif arguments.label_spans:
            read = partial(read_labeled, field=arguments.text_field or "text", spans=arguments.label_spans)
            pairs, fields = [(arguments.inputs,), (heldout_files,)], TEXT_FIELDS
        elif arguments.fields:
            fields = tuple(arguments.fields)
            read = partial(read_records, fields=fields, label=arguments.label)
            pairs = [(arguments.inputs,), (heldout_files,)]
        elif arguments.fasta:
            return cls.of_fasta(arguments)
        elif arguments.ids:
            read = partial(read_ids, n_ids=arguments.ids, section_bytes=int(arguments.section_mb * 2**20))
            read = partial(read, field=arguments.text_field or "input_ids")
            pairs, fields = [(arguments.inputs,), (heldout_files,)], TEXT_FIELDS
        elif arguments.repository:
            read = partial(read_repositories, options=text_options(arguments), skipped=left_out)
            read = partial(read, order=arguments.file_order)
            pairs, fields = [(arguments.inputs,), (heldout_files,)], TEXT_FIELDS
        elif arguments.in_place:
            for path in (*arguments.inputs, *heldout_files):
                if not path.is_file():
                    raise DataError(f"{path}: no such file; --in-place indexes .tar files")
            read, pairs, fields = read_bytes, [(arguments.inputs,), (heldout_files,)], TEXT_FIELDS
        elif arguments.bytes:
            read = partial(read_bytes, options=text_options(arguments), skipped=left_out)
            pairs, fields = [(arguments.inputs,), (heldout_files,)], TEXT_FIELDS
        else:
            read = partial(read_text, options=text_options(arguments), skipped=left_out)
            pairs, fields = [(arguments.inputs,), (heldout_files,)], TEXT_FIELDS
        return cls(
            fields, partial(read, *pairs[0]), partial(read, *pairs[1]) if heldout_files else None, left_out, paths
        )

    @classmethod
    def of_fasta(cls, arguments: argparse.Namespace) -> InputFormat:
        patterns: list[str] = arguments.heldout_chromosomes

        def is_heldout(name: str) -> bool:
            """By SPECIES/CHROMOSOME or CHROMOSOME."""
            return any(fnmatchcase(name, p) or fnmatchcase(name.rpartition("/")[2], p) for p in patterns)

        options = FastaOptions(
            arguments.case, arguments.max_n, int(arguments.section_mb * 2**20), lambda name: not is_heldout(name)
        )
        records = partial(read_fasta, arguments.inputs, arguments.bed, options)
        heldout = None
        if arguments.heldout_from:
            heldout = partial(read_fasta, arguments.heldout_from, (), options)
        elif patterns:
            heldout = partial(
                read_fasta, arguments.inputs, arguments.bed, replace(options, is_selected=is_heldout)
            )
        paths = (*arguments.inputs, *arguments.bed, *arguments.heldout_from)
        return cls(TEXT_FIELDS, records, heldout, SkippedFiles(), paths)


def text_options(arguments: argparse.Namespace) -> TextOptions:
    return TextOptions(
        suffixes=tuple(arguments.suffix),
        text_field=arguments.text_field or "text",
        as_text=tuple(arguments.as_text),
        skip_packed=arguments.skip_unreadable,
        section_bytes=int(arguments.section_mb * 2**20),
        output=arguments.output,
    )
