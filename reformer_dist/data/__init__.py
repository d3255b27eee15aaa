"""From text to batches: data sets of tar shards, read in an order that no number of ranks changes."""

from reformer_dist.data.format.corpus import Corpus, CorpusShard, describe_changes
from reformer_dist.data.format.dataset import Dataset
from reformer_dist.data.format.index import IndexEntry
from reformer_dist.data.format.layout import SPLITS, TEXT_FIELDS, Shard
from reformer_dist.data.format.quarantine import DamagedSample, Quarantine
from reformer_dist.data.format.sample_reader import Sample, SampleReader, SampleRef, make_sample
from reformer_dist.data.format.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from reformer_dist.data.format.verify import verify_dataset
from reformer_dist.data.loading.collate import Batch, Example, MakeExample, TextRows, DrawKey, collate, next_tokens
from reformer_dist.data.loading.heldout import EvalBatch, count_text_bytes, heldout_batches, read_split
from reformer_dist.data.loading.loader import StepBatch, TrainLoader
from reformer_dist.data.loading.packing import IGNORE_INDEX, Span, TextRow, make_row
from reformer_dist.data.loading.replay import Replay
from reformer_dist.data.loading.sampler import Sampler, seeded_bits
from reformer_dist.data.loading.state import LoaderState, consumed_hash, merge_states, read_state
from reformer_dist.data.prepare.documents import SkippedFiles, read_documents
from reformer_dist.data.prepare.records import RawSample, read_jsonl, read_parallel, read_squad
from reformer_dist.data.prepare.writer import WriteSummary, is_heldout, assign_splits, write_dataset, write_samples

__all__ = [
    "IGNORE_INDEX",
    "SPLITS",
    "TEXT_FIELDS",
    "Batch",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "DamagedSample",
    "Dataset",
    "EvalBatch",
    "Example",
    "IndexEntry",
    "SkippedFiles",
    "MakeExample",
    "Sampler",
    "CorpusShard",
    "Span",
    "Quarantine",
    "RawSample",
    "Replay",
    "Sample",
    "SampleReader",
    "Shard",
    "SampleRef",
    "LoaderState",
    "StepBatch",
    "TextRow",
    "TextRows",
    "Tokenizer",
    "TrainLoader",
    "DrawKey",
    "WriteSummary",
    "collate",
    "consumed_hash",
    "count_text_bytes",
    "describe_changes",
    "verify_dataset",
    "heldout_batches",
    "is_heldout",
    "read_documents",
    "load_tokenizer",
    "make_row",
    "merge_states",
    "next_tokens",
    "read_jsonl",
    "read_parallel",
    "read_squad",
    "read_state",
    "make_sample",
    "seeded_bits",
    "assign_splits",
    "read_split",
    "write_dataset",
    "write_samples",
]
