"""From text to batches: data sets of tar shards, read in an order that no number of ranks changes."""

from reformer_dist.data.batches import Batch, Example, TextRows
from reformer_dist.data.corpus import Corpus, Part, explain_changes
from reformer_dist.data.dataset import Dataset
from reformer_dist.data.heldout import EvalBatch, count_text_bytes, heldout_batches
from reformer_dist.data.index import IndexEntry
from reformer_dist.data.layout import SPLITS, Shard
from reformer_dist.data.loader import StepBatch, TrainLoader
from reformer_dist.data.order import Order
from reformer_dist.data.quarantine import Damage, Quarantine
from reformer_dist.data.replay import Replay
from reformer_dist.data.samples import SampleReader, Source
from reformer_dist.data.sources import iterate_documents
from reformer_dist.data.state import Start, consumed_hash, merge_states, read_state
from reformer_dist.data.streams import IGNORED_LABEL
from reformer_dist.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from reformer_dist.data.verify import find_damage
from reformer_dist.data.writer import WriteSummary, is_heldout, write_dataset

__all__ = [
    "IGNORED_LABEL",
    "SPLITS",
    "Batch",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "Damage",
    "Dataset",
    "EvalBatch",
    "Example",
    "IndexEntry",
    "Order",
    "Part",
    "Quarantine",
    "Replay",
    "SampleReader",
    "Shard",
    "Source",
    "Start",
    "StepBatch",
    "TextRows",
    "Tokenizer",
    "TrainLoader",
    "WriteSummary",
    "consumed_hash",
    "count_text_bytes",
    "explain_changes",
    "find_damage",
    "heldout_batches",
    "is_heldout",
    "iterate_documents",
    "load_tokenizer",
    "merge_states",
    "read_state",
    "write_dataset",
]
