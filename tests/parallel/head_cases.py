"""Heads over slices of the sequence against the whole, checked on every rank of a job.

Loss, every gradient, and what an evaluation tells.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from slice_checks import check_training
from torch import Tensor

from reformer_dist.config import AttentionKind, DataConfig, ModelConfig, Pooling, RunConfig, TaskConfig, TaskKind
from reformer_dist.data import ByteTokenizer
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.models import ReformerForQuestionAnswering, ReformerForSequenceClassification
from reformer_dist.models.base import ReformerModel
from reformer_dist.parallel import SlicedSequence
from reformer_dist.tasks import Task
from reformer_dist.tasks.question_answering import QuestionAnswering
from reformer_dist.tasks.sequence_classification import SequenceClassification
from reformer_dist.training.batches import IGNORE_INDEX, MicroBatch
from reformer_dist.training.evaluation import evaluate

SEQ_LEN, VOCAB, N_CLASSES = 45, 20, 5  # four ranks do not divide it
KINDS = [AttentionKind.local, AttentionKind.lsh]
DRAWS = {"step": 0, "dropout_seed": 1}


def check(
    job: Runtime, model: ReformerModel, rows: dict[str, Tensor], task: Task, sequence: SlicedSequence
) -> None:
    batch = MicroBatch.from_rows(rows, sequence, labels_per_row=task.labels_per_row)
    assert job.sum([float(batch.n_labels)]) == [float((rows["labels"] != IGNORE_INDEX).sum())]
    check_training(model, model(**rows, **DRAWS), batch, **DRAWS)
    check_evaluation(job, model.eval(), rows, task, sequence)
    model.train()


def check_evaluation(
    job: Runtime, model: ReformerModel, rows: dict[str, Tensor], task: Task, sequence: SlicedSequence
) -> None:
    """Of the rows, and of the same with what the model says for labels: then it is right everywhere."""
    alone = SlicedSequence(make_mesh(job, 1, 1), sequence.seq_len)
    outputs = model(**{name: x for name, x in rows.items() if name != "labels"})
    said = task.predict(outputs, alone).masked_fill(rows["labels"] == IGNORE_INDEX, IGNORE_INDEX)
    for labels, least in ((rows["labels"], 0.0), (said, 1.0)):
        batch = rows | {"labels": labels}
        shared = evaluate(model, [batch], task, job, sequence)
        whole = evaluate(model, [batch], task, job, alone)  # by each rank
        assert shared.n_labels == whole.n_labels // job.world_size and shared.accuracy == whole.accuracy
        assert abs(shared.loss - whole.loss) <= 1e-5 * whole.loss and shared.accuracy >= least


def check_tasks(job: Runtime, config: ModelConfig, sequence: SlicedSequence) -> None:
    seq_len = sequence.seq_len
    tokens = torch.randint(0, VOCAB, (3, seq_len), generator=torch.Generator().manual_seed(0))
    real = torch.arange(seq_len) < torch.tensor([[seq_len], [2 * seq_len // 3], [2]])
    rows = {"tokens": tokens, "key_padding_mask": real}
    kind = TaskConfig(kind=TaskKind.question_answering)
    run = RunConfig(task=kind, model=config, data=DataConfig(seq_len=SEQ_LEN))
    for pooling in Pooling:
        model = ReformerForSequenceClassification(replace(config, pooling=pooling), VOCAB, N_CLASSES)
        classes = SequenceClassification(run, ByteTokenizer(), list("abcde"))
        check(job, model, rows | {"labels": torch.tensor([3, IGNORE_INDEX, 1])}, classes, sequence)
    rows["answer_mask"] = real & (torch.arange(seq_len) >= min(4, seq_len - 2))
    answers = torch.tensor([[seq_len - 2, seq_len - 1], [2 * seq_len // 3 - 1] * 2, [IGNORE_INDEX, IGNORE_INDEX]])
    asked = ReformerForQuestionAnswering(config, VOCAB)
    check(job, asked, rows | {"labels": answers}, QuestionAnswering(run, ByteTokenizer()), sequence)
    # in the question and in the padding: no rank holds an answer there
    rows["labels"] = torch.tensor([[0, seq_len - 1], [2 * seq_len // 3, 2 * seq_len // 3 - 1], [0, seq_len - 1]])
    check_training(
        asked, asked.train()(**rows, **DRAWS), MicroBatch.from_rows(rows, sequence, labels_per_row=True), **DRAWS
    )


def run_tasks(job: Runtime, heads: int, seq_len: int) -> None:
    mesh = make_mesh(job, heads, job.world_size // heads)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_buckets": 4, "window": 8, "local_window": 8}
    config = ModelConfig(**sizes, layers=KINDS, causal=False, dropout=0.1, axial_shape=[8, 8])
    check_tasks(job, config, SlicedSequence(mesh, seq_len))
