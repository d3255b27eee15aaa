"""Documents from FASTA: sequences of one or several species, or regions of a BED file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from reformer_dist.data.format.dna import LETTERS, reverse_complement
from reformer_dist.data.prepare.documents import FASTA_SUFFIXES, SECTION_BYTES
from reformer_dist.data.prepare.raw_files import open_raw, uncompressed_name
from reformer_dist.data.prepare.samples import RawSample
from reformer_dist.errors import DataError

BLOCK_BYTES = 1 << 20
CASES = ("upper", "keep", "mask")
_MASK = bytes.maketrans(bytes(LETTERS).lower(), b"N" * len(LETTERS))

Piece = tuple[int, bytes]
"""(position of its first base in the sequence, bases)."""


@dataclass(frozen=True)
class FastaOptions:
    """How sequences become documents."""

    case: str = "upper"
    """upper: soft-masked (lower-case) bases are read as the others; keep: they stay; mask: they become N."""
    max_n: int = 10
    """Longer runs of N end a document and are left out."""
    section_bytes: int = SECTION_BYTES
    """Longer documents are cut into sections of this size up to twice this size."""
    is_selected: Callable[[str], bool] = lambda name: True
    """Whether the sequence of this name, SPECIES/CHROMOSOME, is read."""


@dataclass(frozen=True)
class Region:
    """A line of a BED file."""

    start: int
    stop: int
    is_reverse: bool
    where: str


def read_fasta(
    paths: Iterable[Path], beds: Sequence[Path] = (), options: FastaOptions | None = None
) -> Iterator[RawSample]:
    """Documents of FASTA files, or of the FASTA files of folders; a file's name without suffixes is the species.

    Documents are named SPECIES/CHROMOSOME:START-STOP, from 0, and those of one chromosome are in the same split.
    beds: none, or one per path, with the regions to read. Raises DataError, which names file and line, for letters
    that are no nucleotides and for regions that don't fit, and if no sequence is selected.
    """
    paths, options = list(paths), options or FastaOptions()
    bed_of = dict(zip(paths, beds, strict=True)) if beds else {}
    files = [(file, bed_of.get(path)) for path in paths for file in _fasta_files(path)]
    seen: dict[str, Path] = {}
    n_selected = 0
    for file, bed in files:
        species = _species(file)
        if seen.setdefault(species, file) != file:
            raise DataError(f"{file}: the species {species} is that of {seen[species]}; rename one of the files")
        regions = None if bed is None else read_bed(bed)
        for chromosome, chunks in _read_sequences(file):
            name = f"{species}/{chromosome}"
            found = None if regions is None else regions.pop(chromosome, [])
            if options.is_selected(name):
                n_selected += 1
                yield from _documents(name, chunks, found, options)
        for lines in (regions or {}).values():
            raise DataError(f"{lines[0].where}: names a sequence that {file} has not")
    if n_selected == 0:
        raise DataError(f"{', '.join(map(str, paths))}: no sequence is selected; there are none of these names")


def read_bed(path: Path) -> dict[str, list[Region]]:
    """Regions by chromosome, in the order of their starts. Raises DataError, which names file and line."""
    regions: dict[str, list[Region]] = defaultdict(list)
    with open_raw(path) as file:
        for number, line in enumerate(file, start=1):
            words, where = line.decode("utf-8", "replace").split(), f"{path}:{number}"
            if not words or words[0] in ("track", "browser") or words[0].startswith("#"):
                continue
            bounds = words[1:3]
            if len(bounds) < 2 or not all(map(str.isdigit, bounds)) or int(bounds[0]) >= int(bounds[1]):
                raise DataError(
                    f"{where}: is {' '.join(words)[:60]!r}; a region must be CHROMOSOME START STOP, from 0"
                )
            strand = words[5] if len(words) > 5 else "+"
            if strand not in "+-.":
                raise DataError(f"{where}: strand {strand!r}: must be +, - or .")
            regions[words[0]].append(Region(int(bounds[0]), int(bounds[1]), strand == "-", where))
    return {chromosome: sorted(found, key=lambda each: each.start) for chromosome, found in regions.items()}


def _fasta_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if uncompressed_name(file.name).endswith(FASTA_SUFFIXES))
    if not found:
        raise DataError(f"{path}: holds no FASTA file; their names must end in {', '.join(FASTA_SUFFIXES)}")
    return found


def _species(path: Path) -> str:
    name = path.name[: len(uncompressed_name(path.name))]
    return Path(name).stem if name.lower().endswith(FASTA_SUFFIXES) else name


def _read_sequences(path: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """(name, bases block by block) of each sequence. A sequence ends when the next one is asked for."""
    names: set[str] = set()
    with open_raw(path) as file:
        blocks = _blocks(file, path)
        _, header = next(blocks, (0, None))
        while header is not None:
            name = header.split(maxsplit=1)[0] if header.split() else ""
            if not name or name in names:
                raise DataError(f"{path}: a sequence is named {name!r}; each must have a name of its own")
            names.add(name)
            after: list[str | None] = [None]
            yield name, (chunks := _until_header(blocks, after))
            for _ in chunks:  # what the caller has not read
                pass
            [header] = after


def _until_header(blocks: Iterator[tuple[bytes, str | None]], after: list[str | None]) -> Iterator[bytes]:
    for bases, header in blocks:
        if header is not None:
            after[0] = header
            return
        yield bases


def _blocks(file: IO[bytes], path: Path) -> Iterator[tuple[bytes, str | None]]:
    """(bases, None) of blocks of lines, and (b"", header) of each header."""
    number = 0  # of lines before
    first = file.readline()
    if not first.startswith(b">"):
        raise DataError(f"{path}:1: begins with {first[:20]!r}; FASTA must begin with > and a name")
    lines = [first]
    while lines:
        if any(line.startswith(b">") for line in lines):
            groups = _split_at_headers(lines)
        else:
            groups = [lines]
        for group in groups:
            if group[0].startswith(b">"):
                yield b"", group[0][1:].decode("utf-8", "replace").strip()
            else:
                yield _bases(group, path, number), None
            number += len(group)
        lines = file.readlines(BLOCK_BYTES)


def _split_at_headers(lines: list[bytes]) -> list[list[bytes]]:
    groups: list[list[bytes]] = []
    for line in lines:
        if line.startswith(b">"):
            groups += [[line], []]
        elif groups:
            groups[-1].append(line)
        else:
            groups.append([line])
    return [group for group in groups if group]


def _bases(lines: list[bytes], path: Path, n_before: int) -> bytes:
    bases = b"".join(lines).translate(None, b" \t\r\n")
    if bases.translate(None, LETTERS):
        for number, line in enumerate(lines, n_before + 1):
            if wrong := line.strip().translate(None, LETTERS + b" \t"):
                hint = "write T for U" if wrong[:1] in b"Uu" else "gaps and proteins can't be read"
                expected = f"must be one of {bytes(LETTERS[: len(LETTERS) // 2]).decode()}; {hint}"
                raise DataError(f"{path}:{number}: letter {wrong[:1].decode('latin-1')!r}: {expected}")
    return bases


def _documents(
    name: str, chunks: Iterator[bytes], regions: list[Region] | None, options: FastaOptions
) -> Iterator[RawSample]:
    parts: Iterable[tuple[int, Iterable[bytes], bool]] = [(0, chunks, False)]
    if regions is not None:
        parts = ((r.start, [bases], r.is_reverse) for r, bases in _cut_regions(name, chunks, regions))
    for first, part, is_reverse in parts:
        for start, bases in _cut(map(_CASE_RULES[options.case], part), options):
            start += first
            place = f"{name}:{start}-{start + len(bases)}"
            text = reverse_complement(bases) if is_reverse else bases
            yield RawSample(f"{place}{'-' * is_reverse}", (text,), split_key=name.encode())


_CASE_RULES: Mapping[str, Callable[[bytes], bytes]] = {
    "upper": bytes.upper,
    "keep": bytes,
    "mask": lambda bases: bases.translate(_MASK),
}


def _cut_regions(name: str, chunks: Iterable[bytes], regions: list[Region]) -> Iterator[tuple[Region, bytes]]:
    """(region, its bases), those that end first before the others."""
    waiting, position = list(reversed(regions)), 0
    active: list[tuple[Region, bytearray]] = []
    for chunk in chunks:
        end = position + len(chunk)
        while waiting and waiting[-1].start < end:
            active.append((waiting.pop(), bytearray()))
        for region, bases in active:
            bases += chunk[max(0, region.start - position) : region.stop - position]
            if region.stop <= end:
                yield region, bytes(bases)
        active = [(region, bases) for region, bases in active if region.stop > end]
        position = end
    for region in [*(region for region, _ in active), *waiting]:
        raise DataError(f"{region.where}: ends at {region.stop}; {name} has {position} bases")


def _cut(chunks: Iterable[bytes], options: FastaOptions) -> Iterator[Piece]:
    """Pieces between long runs of N, cut into sections."""
    size = options.section_bytes
    run = re.compile(rb"[Nn]{%d,}" % (options.max_n + 1))
    buffer, start = b"", 0
    for chunk in chunks:
        buffer += chunk
        while (found := run.search(buffer)) and found.end() < len(buffer):
            yield from _sections(buffer[: found.start()], start, size)
            buffer, start = buffer[found.end() :], start + found.end()
        n_open = len(buffer) - len(buffer.rstrip(b"Nn"))  # of a run that may go on
        while len(buffer) - n_open >= 2 * size:
            yield start, buffer[:size]
            buffer, start = buffer[size:], start + size
    found = run.search(buffer)
    yield from _sections(buffer[: found.start()] if found else buffer, start, size)


def _sections(bases: bytes, start: int, size: int) -> Iterator[Piece]:
    while len(bases) >= 2 * size:
        yield start, bases[:size]
        bases, start = bases[size:], start + size
    if bases:
        yield start, bases
