"""Tar files of other programs, such as WebDataset shards, as a dataset without a copy: only indexes are written.

A sample is the text in one of its members. It is read and tokenized once, to count its tokens and to record its
checksum, and again whenever it is trained on. The indexes of finished tar files are kept if the command is
interrupted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reformer_dist.data.format.dataset_layout import (
    FORMAT_VERSION,
    MAX_SAMPLE_BYTES,
    SPLITS,
    Shard,
    require_plain_name,
    write_json,
)
from reformer_dist.data.format.tar_members import TextMember, sample_key
from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.data.prepare.encode_parallel import OnRead, map_in_parallel
from reformer_dist.data.prepare.raw_files import read_counter
from reformer_dist.data.prepare.samples import is_heldout
from reformer_dist.data.prepare.shard_writer import WriteSummary
from reformer_dist.data.prepare.staging import (
    INDEX_FOLDER,
    TEXT_MEMBER,
    dataset_record,
    publish,
    require_no_dataset,
    staging_folder,
)
from reformer_dist.errors import DataError
from reformer_dist.fs.atomic import file_sha256

MAX_SHOWN_SUFFIXES = 8


@dataclass(frozen=True)
class TarJob:
    """A tar file to index."""

    path: Path
    member: TextMember
    heldout_fraction: float
    """Of its samples: 1 for a file of held-out samples."""
    skips_others: bool
    """Leaves out samples without the member."""

    def split_of(self, text: bytes) -> str:
        if self.heldout_fraction in (0, 1):
            return SPLITS[int(self.heldout_fraction)]
        return "heldout" if is_heldout(text, self.heldout_fraction) else "train"


def index_tar_files(
    paths: Sequence[Path],
    folder: Path,
    tokenizer: Tokenizer,
    member: TextMember,
    *,
    heldout: Sequence[Path] = (),
    heldout_fraction: float = 0.05,
    skip_others: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    on_read: OnRead = lambda n_bytes: None,
) -> WriteSummary:
    """Writes a dataset of the samples of tar files to a folder: in it, or links in it, if they are elsewhere.

    Samples keep their order. heldout: files whose samples are held out; by default, a fraction of the samples is,
    by content. Raises DataError, which names tar file and member, if a sample has no text.
    """
    require_no_dataset(folder, overwrite)
    fractions = [0.0 if heldout else heldout_fraction] * len(paths) + [1.0] * len(heldout)
    jobs = [TarJob(p, member, f, skip_others) for p, f in zip([*paths, *heldout], fractions, strict=True)]
    names = Counter(job.path.name for job in jobs)
    for job in jobs:
        require_plain_name(job.path.name, str(job.path))
        if names[job.path.name] > 1:
            raise DataError(f"{job.path}: another tar file has this name; index them as several datasets")
    with staging_folder(folder, resume=True) as staging:
        found: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        n_empty = 0
        indexes = staging / INDEX_FOLDER
        results = map_in_parallel(_index_tar, jobs, tokenizer, indexes, workers)
        for job, (shards, n_skipped) in zip(jobs, results, strict=True):
            n_empty += n_skipped
            read_counter.n_bytes += job.path.stat().st_size
            on_read(sum(shard["text_bytes"] for shard in shards.values()))
            for split, shard in shards.items():
                found[split].append(Shard(**shard))
        summary = WriteSummary(found, empty=n_empty)
        _check_splits(summary, heldout_fraction)
        record = dataset_record(found, tokenizer, staging, {TEXT_MEMBER: member.to_json()})
        for name in (shard.index_name for split in SPLITS for shard in found[split]):
            (indexes / name).replace(staging / name)
        shutil.rmtree(indexes)
        publish(staging, folder, record, ())
        for job in jobs:
            link = folder / job.path.name
            if not link.exists():
                link.symlink_to(job.path.resolve())
    return summary


def _check_splits(summary: WriteSummary, heldout_fraction: float) -> None:
    if not summary.splits["train"] or (heldout_fraction and not summary.splits["heldout"]):
        empty = "heldout" if summary.splits["train"] else "train"
        hint = "name tar files by --heldout-from, or give another --heldout"
        raise DataError(f"--heldout {heldout_fraction}: the split {empty} would be empty; {hint}")


Indexed = tuple[dict[str, dict[str, Any]], int]
"""(record of the shard by split, samples that were left out)."""


def _index_tar(job: TarJob, folder: Path, tokenizer: Tokenizer, spec: str) -> Indexed:
    """Writes the indexes of a tar file into a folder, unless an interrupted run has."""
    status = job.path.stat()
    done = folder / f"{job.path.name}.done"
    identity = [spec, repr(job), status.st_size, status.st_mtime_ns]
    if done.is_file() and (saved := json.loads(done.read_text()))["identity"] == identity:
        return saved["shards"], saved["skipped"]
    entries, n_skipped = _read_entries(job, tokenizer)
    shards = {}
    for split in SPLITS:
        if entries[split]:
            index = folder / f"{split}-{job.path.name}.json"
            write_json(index, {"format": FORMAT_VERSION, "shard": job.path.name, "samples": entries[split]})
            shards[split] = {
                "name": job.path.name,
                "size": status.st_size,
                "sha256": file_sha256(job.path),
                "index_sha256": file_sha256(index),
                "samples": len(entries[split]),
                "tokens": sum(entry["n_tokens"] for entry in entries[split]),
                "text_bytes": sum(entry["n_bytes"] for entry in entries[split]),
                "index": index.name,
            }
    write_json(done, {"identity": identity, "shards": shards, "skipped": n_skipped})
    return shards, n_skipped


def _read_entries(job: TarJob, tokenizer: Tokenizer) -> tuple[dict[str, list[dict[str, Any]]], int]:
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    keys: list[str] = []  # of all samples, in order
    suffixes: Counter[str] = Counter()
    used: set[str] = set()
    try:
        with tarfile.open(job.path, "r:") as tar:
            for member in tar:
                key, suffix = sample_key(member.name)
                if not member.isfile():
                    continue
                suffixes[suffix] += 1
                keys += [key] if keys[-1:] != [key] else []
                if suffix == job.member.suffix:
                    entry, text = _make_entry(job, tar, member, len(used), tokenizer)
                    used.add(key)
                    if entry["n_bytes"]:
                        entries[job.split_of(text)].append(entry)
    except (tarfile.TarError, OSError, EOFError) as error:
        hint = "a compressed tar file can't be read in place: give it without --in-place"
        raise DataError(f"{job.path}: is not a whole tar file ({error}); {hint}") from error
    without = [key for key in keys if key not in used]
    if not used or (without and not job.skips_others):
        held = ", ".join(f".{suffix}" for suffix, _ in suffixes.most_common(MAX_SHOWN_SUFFIXES)) or "nothing"
        hint = "name another by --member, or leave such samples out with --skip-unreadable"
        where = f"{job.path}: sample {without[0]!r}" if without else str(job.path)
        raise DataError(f"{where}: has no member .{job.member.suffix}; the file holds {held}: {hint}")
    return entries, len(keys) - sum(map(len, entries.values()))


def _make_entry(
    job: TarJob, tar: tarfile.TarFile, member: tarfile.TarInfo, number: int, tokenizer: Tokenizer
) -> tuple[dict[str, Any], bytes]:
    where = f"{job.path}: {member.name}"
    if member.size > MAX_SAMPLE_BYTES:
        raise DataError(f"{where}: holds {member.size} bytes; the maximum is {MAX_SAMPLE_BYTES}")
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    content = file.read()
    text = tokenizer.normalize(job.member.text(content, where))
    entry = {
        "key": f"{number:08d}",
        "document": member.name,
        "offset": member.offset_data,
        "size": member.size,
        "n_tokens": len(tokenizer.encode(text)) + 1,
        "n_bytes": len(text),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return entry, text
