"""Random damage of every kind: each case ends in skipped samples or in a refusal that gives the reason.

What is read in spite of the damage is right: it is what the whole dataset holds, less the samples that are named.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.damage import BYTES, edit_json, edit_json_file
from support.datasets import documents_of, edit_index, edit_record, folder_of, make_sampler

from reformer_dist.data import Corpus, Dataset, Quarantine, SampleReader, SampleRef
from reformer_dist.data.format.quarantine import CheckedReader
from reformer_dist.data.loading.packing import TokenStream
from reformer_dist.errors import DataError

N_CASES = 240


def forge_member(folder: Path, draw: random.Random) -> None:
    """Replaces the header of a sample by another valid one, as in a forged shard."""
    path = draw.choice(sorted(folder.glob("train-*.tar")))
    with tarfile.open(path) as tar:
        member = draw.choice(tar.getmembers())
    start = member.offset
    odd_names = [
        "../../x.txt",
        "/etc/passwd",
        "x.pkl",
        "a/../b.txt",
        "c\\d.txt",
        "00000999.txt",
        "x" * 90,
        "\xff.txt",
    ]
    change: Callable[[], Any] = draw.choice(
        [
            lambda: setattr(member, "name", draw.choice(odd_names)),
            lambda: setattr(member, "type", draw.choice(b"1234567xgLKS").to_bytes(1, "little")),
            lambda: setattr(member, "size", draw.choice([0, 1, member.size + 512, 1 << 33, 1 << 60])),
            lambda: setattr(member, "linkname", "/etc/passwd"),
        ]
    )
    change()
    content = bytearray(path.read_bytes())
    content[start : start + 512] = member.tobuf(tarfile.GNU_FORMAT)[-512:]
    path.write_bytes(content)


def swap_members(folder: Path, draw: random.Random) -> None:
    """Swaps two shards or two indexes."""
    suffix = draw.choice(["tar", "json"])
    one, other = draw.sample(sorted(folder.glob(f"train-*.{suffix}")), 2)
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def edit_signed_record(folder: Path, draw: random.Random) -> None:
    edit_record(folder, lambda record: edit_json(record, draw))


def edit_signed_index(folder: Path, draw: random.Random) -> None:
    name = draw.choice(sorted(folder.glob("train-*.json"))).name
    edit_index(folder, name, lambda samples: edit_json(samples, draw))


def damage_bytes(folder: Path, draw: random.Random) -> None:
    draw.choice(BYTES)(draw.choice([path for path in sorted(folder.iterdir()) if path.is_file()]), draw)


def edit_unsigned(folder: Path, draw: random.Random) -> None:
    edit_json_file(draw.choice(sorted(folder.glob("*.json"))), draw)


KINDS = (
    damage_bytes,
    damage_bytes,
    forge_member,
    swap_members,
    edit_signed_record,
    edit_signed_index,
    edit_unsigned,
)


def read_all(folder: Path) -> tuple[Counter[bytes], set[str], set[str]]:
    """(documents of one pass, ids of the samples read, ids of the samples skipped)."""
    corpus = Corpus.open([folder])
    list(corpus.check("train", 0.9))
    quarantine = Quarantine(corpus.total("samples", "train"), 0.9)
    reader = CheckedReader(quarantine)
    stream = TokenStream(make_sampler(corpus, batch_size=1, seq_len=1000), 0, passes=1)
    texts: Counter[bytes] = Counter()
    read: set[str] = set()
    try:
        while spans := stream.next_spans(0, reader.open):
            for span in (span for span in spans if span.start == 0):
                texts[bytes(span.tokens[:-1].astype("uint8"))] += 1
                read.add(f"{span.ref.shard.name}/{span.ref.entry.key}")
    finally:
        reader.close()
    return texts, read, {f"{shard}/{key}" for _, shard, key in reader.skipped_samples}


def outcome(folder: Path, whole: Counter[bytes]) -> str:
    """The outcome for a damaged dataset; fails unless it is a skip, a refusal, or harmless to training."""
    try:
        texts, read, passed_over = read_all(folder)
    except DataError as error:
        assert str(folder) in str(error) and len(str(error)) > len(str(folder)) + 10, error
        return "refused"
    assert texts <= whole
    lost = sum(whole.values()) - sum(texts.values())
    assert lost == len(passed_over) and not read & passed_over
    return "passed over" if lost else "harmless"


@pytest.fixture(scope="module")
def small(make_dataset: Callable[..., Dataset]) -> Dataset:
    return make_dataset([(f"doc{n}", b"text %d " % n * (1 + n * 7 % 60)) for n in range(60)], shard_bytes=8_000)


def test_every_damage_ends_in_a_skip_or_a_refusal(small: Dataset, tmp_path: Path) -> None:
    whole = Counter(bytes(tokens[:-1].astype("uint8")) for tokens in documents_of(small))
    found: dict[str, Counter[str]] = {}
    for case in range(N_CASES):
        draw = random.Random(case)
        folder = tmp_path / f"case-{case}"
        shutil.copytree(folder_of(small), folder)
        kind = KINDS[case % len(KINDS)]
        kind(folder, draw)
        found.setdefault(kind.__name__, Counter())[outcome(folder, whole)] += 1
        shutil.rmtree(folder)
    total = sum(found.values(), Counter[str]())
    assert total["refused"] + total["passed over"] > 150 and total["passed over"] > 30, found
    # damage may only be harmless in held-out shards and in names of documents, which training does not read
    assert found["swap_members"]["harmless"] == 0
    assert found["forge_member"]["harmless"] <= 15


def test_an_undamaged_data_set_is_read_whole(small: Dataset) -> None:
    whole = Counter(bytes(tokens[:-1].astype("uint8")) for tokens in documents_of(small))
    assert outcome(folder_of(small), whole) == "harmless"


def test_a_missing_check_is_noticed(small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer notices wrong results: here, checksums of samples are not verified."""
    whole = Counter(bytes(tokens[:-1].astype("uint8")) for tokens in documents_of(small))
    folder = tmp_path / "copy"
    shutil.copytree(folder_of(small), folder)
    path = sorted(folder.glob("train-*.tar"))[0]
    content = bytearray(path.read_bytes())
    content[512] ^= 1
    path.write_bytes(content)
    assert outcome(folder, whole) == "passed over"

    def believe(reader: Any, source: SampleRef) -> Any:
        payload = reader._read_bytes(source)[512:]
        fake = source.entry.__class__(
            **{name: getattr(source.entry, name) for name in source.entry.__slots__}
            | {"sha256": hashlib.sha256(payload).hexdigest()}
        )
        return read(reader, SampleRef(source.dataset, source.shard, fake))

    read = SampleReader.read
    monkeypatch.setattr(SampleReader, "read", believe)
    with pytest.raises(AssertionError):
        outcome(folder, whole)
