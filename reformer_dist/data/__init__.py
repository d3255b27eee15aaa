"""Data: from text to batches, through datasets of tar shards, in the same order for any number of ranks.

`format` defines datasets on disk, `prepare` writes them from raw files, and `loading` turns them into batches.
"""

from reformer_dist.data.format.corpus import Corpus, describe_changes
from reformer_dist.data.format.dataset import Dataset
from reformer_dist.data.format.dataset_layout import SPLITS, TEXT_FIELDS, Shard
from reformer_dist.data.format.dna import DNA
from reformer_dist.data.format.id_tokenizer import IdTokenizer
from reformer_dist.data.format.label_spans import label_mask, read_groups, read_spans
from reformer_dist.data.format.load_tokenizer import load_tokenizer, open_vocabulary
from reformer_dist.data.format.quarantine import DamagedSample, Quarantine
from reformer_dist.data.format.sample_reader import Sample, SampleReader, SampleRef, make_sample
from reformer_dist.data.format.tar_members import TextMember
from reformer_dist.data.format.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer
from reformer_dist.data.format.verify import verify_dataset
from reformer_dist.data.loading.collate import (
    FILL_VALUES,
    Batch,
    Example,
    MakeExample,
    collate,
    next_token_example,
    next_token_examples,
    pack_examples,
)
from reformer_dist.data.loading.cut import Era
from reformer_dist.data.loading.heldout import (
    RowSelection,
    count_rows,
    count_text_bytes,
    heldout_sample_batches,
    heldout_text_batches,
    read_split,
)
from reformer_dist.data.loading.loader import StepBatch, TrainLoader
from reformer_dist.data.loading.loader_state import (
    LoaderState,
    consumed_hash,
    merge_states,
    read_state,
    saved_interleaving,
)
from reformer_dist.data.loading.packing import Span, document_ids, pack_spans, positions_in_documents
from reformer_dist.data.loading.replay import Replay
from reformer_dist.data.loading.sampler import DrawKey, Sampler
from reformer_dist.data.loading.strands import draws_reverse, reverse_complement_row, reverse_documents
from reformer_dist.data.prepare.documents import (
    AS_TEXT_SUFFIXES,
    SECTION_BYTES,
    SkippedFiles,
    TextOptions,
    read_bytes,
    read_text,
)
from reformer_dist.data.prepare.fasta import CASES, FastaOptions, read_fasta
from reformer_dist.data.prepare.fill_in_middle import FIM_TOKENS, FillInMiddle
from reformer_dist.data.prepare.formats import RECORD_SUFFIXES
from reformer_dist.data.prepare.ids import read_ids
from reformer_dist.data.prepare.in_place import index_tar_files
from reformer_dist.data.prepare.raw_files import read_counter
from reformer_dist.data.prepare.records import read_labeled, read_parallel, read_records, read_squad
from reformer_dist.data.prepare.repository import FILE_ORDERS, read_repositories
from reformer_dist.data.prepare.samples import RawSample, assign_splits, is_heldout, sample_texts
from reformer_dist.data.prepare.shard_writer import WriteSummary, write_dataset, write_samples
from reformer_dist.data.prepare.staging import has_finished_work
from reformer_dist.ops.cross_entropy import IGNORE_INDEX

__all__ = [
    "AS_TEXT_SUFFIXES",
    "CASES",
    "DNA",
    "FILE_ORDERS",
    "FILL_VALUES",
    "FIM_TOKENS",
    "IGNORE_INDEX",
    "RECORD_SUFFIXES",
    "SECTION_BYTES",
    "SPLITS",
    "TEXT_FIELDS",
    "Batch",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "DamagedSample",
    "Dataset",
    "DrawKey",
    "Era",
    "Example",
    "FastaOptions",
    "FillInMiddle",
    "IdTokenizer",
    "LoaderState",
    "MakeExample",
    "Quarantine",
    "RawSample",
    "Replay",
    "RowSelection",
    "Sample",
    "SampleReader",
    "SampleRef",
    "Sampler",
    "Shard",
    "SkippedFiles",
    "Span",
    "StepBatch",
    "TextMember",
    "TextOptions",
    "Tokenizer",
    "TrainLoader",
    "WriteSummary",
    "assign_splits",
    "collate",
    "consumed_hash",
    "count_rows",
    "count_text_bytes",
    "describe_changes",
    "document_ids",
    "draws_reverse",
    "has_finished_work",
    "heldout_sample_batches",
    "heldout_text_batches",
    "index_tar_files",
    "is_heldout",
    "label_mask",
    "load_tokenizer",
    "make_sample",
    "merge_states",
    "next_token_example",
    "next_token_examples",
    "open_vocabulary",
    "pack_examples",
    "pack_spans",
    "positions_in_documents",
    "read_bytes",
    "read_counter",
    "read_fasta",
    "read_groups",
    "read_ids",
    "read_labeled",
    "read_parallel",
    "read_records",
    "read_repositories",
    "read_spans",
    "read_split",
    "read_squad",
    "read_state",
    "read_text",
    "reverse_complement_row",
    "reverse_documents",
    "sample_texts",
    "saved_interleaving",
    "verify_dataset",
    "write_dataset",
    "write_samples",
]
