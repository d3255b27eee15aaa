"""From text to batches: data sets of tar shards, read in an order that no number of ranks changes."""

from reformer_dist.data.dataset import Dataset
from reformer_dist.data.heldout import IGNORED_LABEL, EvalBatch, count_text_bytes, heldout_batches
from reformer_dist.data.index import IndexEntry, find_damage, read_index, read_sample
from reformer_dist.data.layout import SPLITS, Shard
from reformer_dist.data.loader import StepBatch, TrainLoader, merge_states
from reformer_dist.data.sources import iterate_documents
from reformer_dist.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from reformer_dist.data.writer import WriteSummary, is_heldout, write_dataset

__all__ = [
    "IGNORED_LABEL",
    "SPLITS",
    "BpeTokenizer",
    "ByteTokenizer",
    "Dataset",
    "EvalBatch",
    "IndexEntry",
    "Shard",
    "StepBatch",
    "Tokenizer",
    "TrainLoader",
    "WriteSummary",
    "count_text_bytes",
    "find_damage",
    "heldout_batches",
    "is_heldout",
    "iterate_documents",
    "load_tokenizer",
    "merge_states",
    "read_index",
    "read_sample",
    "write_dataset",
]
