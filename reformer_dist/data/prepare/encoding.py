"""Samples as they are stored: token ids, checksum, and the record of the index."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import IO, Any

import numpy as np

from reformer_dist.data.format.dataset_layout import MAX_SAMPLE_BYTES
from reformer_dist.data.format.label_spans import GROUPS, SPANS, token_spans
from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.data.prepare.samples import ID_DTYPE, Assigned, RawSample
from reformer_dist.errors import DataError

KEY_BYTES = 16


@dataclass(frozen=True)
class EncodedSample:
    """A sample of a split with its token ids. Its values are plain, since they are marshalled to disk."""

    key: bytes
    """Hash of its name and raw fields, in whose order samples are written."""
    split: str
    name: str
    payload: bytes
    """Token ids of all fields, little-endian; empty if the sample is not written because a field is empty."""
    sha256: str = ""
    """Of the payload."""
    lengths: tuple[int, ...] = ()
    """Tokens of each field."""
    n_bytes: int = 0
    """Bytes of text, or of ids that were given."""
    is_normalized: bool = False
    """Whether the tokenizer changed the text."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def dump(self, file: IO[bytes]) -> None:
        marshal.dump([getattr(self, each.name) for each in fields(self)], file)

    @classmethod
    def load(cls, file: IO[bytes]) -> EncodedSample:
        return cls(*marshal.load(file))  # written by this package, in a folder that it made


def encode_sample(assigned: Assigned, tokenizer: Tokenizer) -> EncodedSample:
    """Raises DataError if a sample is too large, or its label spans do not fit."""
    split, sample = assigned
    key = order_key(sample)
    if not all(sample.fields):
        return EncodedSample(key, split, sample.name, b"")
    if sample.is_ids:
        texts = sample.fields
        parts = [np.frombuffer(ids, ID_DTYPE) for ids in texts]
    elif sample.fill_in_middle is not None and split == "train":
        pieces = [tokenizer.normalize(part) for part in _parts(sample)]
        texts, parts = (b"".join(pieces),), [sample.fill_in_middle.encode(pieces, tokenizer)]
    else:
        texts = tuple(tokenizer.normalize(text) for text in sample.fields)
        parts = [tokenizer.encode(text) for text in texts]
    metadata = dict(sample.metadata)
    if sample.label_spans:
        metadata[SPANS] = token_spans(sample.label_spans, parts[0], tokenizer, sample.name)
        metadata |= {GROUPS: list(sample.label_groups)} if sample.label_groups else {}
    payload = np.concatenate(parts).astype(np.dtype(tokenizer.dtype).newbyteorder("<")).tobytes()
    if len(payload) > MAX_SAMPLE_BYTES:
        expected = f"the maximum is {MAX_SAMPLE_BYTES}: cut the document into several"
        raise DataError(f"{sample.name}: holds {len(payload)} bytes of token ids; {expected}")
    return EncodedSample(
        key,
        split,
        sample.name,
        payload,
        hashlib.sha256(payload).hexdigest(),
        tuple(map(len, parts)),
        sum(map(len, texts)),
        texts != sample.fields,
        metadata,
    )


def _parts(sample: RawSample) -> Iterator[bytes]:
    [text] = sample.fields
    start = 0
    for size in sample.part_sizes or (len(text),):
        yield text[start : start + size]
        start += size


def order_key(sample: RawSample) -> bytes:
    """Hash of a sample's name and fields, by which it is placed among the others."""
    digest = hashlib.blake2b(
        sample.name.encode("utf-8", "surrogateescape"), digest_size=KEY_BYTES, person=b"order"
    )
    for text in sample.fields:
        digest.update(b"\0" + text)
    return digest.digest()


def samples_digest(samples: Iterable[Assigned], tokenizer_spec: str) -> str:
    """Hash of all that determines how these samples are encoded, to recognize them after an interruption."""
    digest = hashlib.blake2b(tokenizer_spec.encode(), digest_size=16)
    for split, sample in samples:
        labels = (sample.metadata, sample.label_spans, sample.label_groups)
        values = (split, sample.name, *labels, sample.is_ids, sample.part_sizes, sample.fill_in_middle)
        digest.update(repr((*values, [len(text) for text in sample.fields])).encode("utf-8", "surrogateescape"))
        for text in sample.fields:
            digest.update(text)
    return digest.hexdigest()
