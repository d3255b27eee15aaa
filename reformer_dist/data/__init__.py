"""From text to batches: data sets of tar shards, read in an order that no number of ranks changes."""

from reformer_dist.data.format.corpus import Corpus, Part, explain_changes
from reformer_dist.data.format.dataset import Dataset
from reformer_dist.data.format.index import IndexEntry
from reformer_dist.data.format.layout import SPLITS, TEXT_FIELDS, Shard
from reformer_dist.data.format.quarantine import Damage, Quarantine
from reformer_dist.data.format.sample_reader import Sample, SampleReader, Source, sample_of
from reformer_dist.data.format.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from reformer_dist.data.format.verify import find_damage
from reformer_dist.data.loading.collate import Batch, Example, MakeExample, TextRows, Visit, collate, next_tokens
from reformer_dist.data.loading.heldout import EvalBatch, count_text_bytes, heldout_batches, split_samples
from reformer_dist.data.loading.loader import StepBatch, TrainLoader
from reformer_dist.data.loading.packing import IGNORED_LABEL, Piece, TextRow, make_row
from reformer_dist.data.loading.replay import Replay
from reformer_dist.data.loading.sampler import Order, seeded_bits
from reformer_dist.data.loading.state import Start, consumed_hash, merge_states, read_state
from reformer_dist.data.prepare.documents import LeftOut, iterate_documents
from reformer_dist.data.prepare.records import Record, read_jsonl, read_parallel, read_squad
from reformer_dist.data.prepare.writer import WriteSummary, is_heldout, split_records, write_dataset, write_records

__all__ = [
    "IGNORED_LABEL",
    "SPLITS",
    "TEXT_FIELDS",
    "Batch",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "Damage",
    "Dataset",
    "EvalBatch",
    "Example",
    "IndexEntry",
    "LeftOut",
    "MakeExample",
    "Order",
    "Part",
    "Piece",
    "Quarantine",
    "Record",
    "Replay",
    "Sample",
    "SampleReader",
    "Shard",
    "Source",
    "Start",
    "StepBatch",
    "TextRow",
    "TextRows",
    "Tokenizer",
    "TrainLoader",
    "Visit",
    "WriteSummary",
    "collate",
    "consumed_hash",
    "count_text_bytes",
    "explain_changes",
    "find_damage",
    "heldout_batches",
    "is_heldout",
    "iterate_documents",
    "load_tokenizer",
    "make_row",
    "merge_states",
    "next_tokens",
    "read_jsonl",
    "read_parallel",
    "read_squad",
    "read_state",
    "sample_of",
    "seeded_bits",
    "split_records",
    "split_samples",
    "write_dataset",
    "write_records",
]
