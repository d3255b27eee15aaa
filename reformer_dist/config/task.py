"""The training task: its inputs, labels and metric."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from reformer_dist.config.checks import ConfigGroup, bounded


class TaskKind(Enum):
    language_model = "language_model"
    """Next-token prediction on text; bits per byte."""
    masked_language_model = "masked_language_model"
    """Prediction of masked tokens of a text; accuracy."""
    completion = "completion"
    """Prediction of the last field of a sample from the others; accuracy of its tokens."""
    sequence_classification = "sequence_classification"
    """One label per text; accuracy."""
    question_answering = "question_answering"
    """The span of a context that answers a question; exact match and F1."""
    sequence_to_sequence = "sequence_to_sequence"
    """Generation of a target from a source; BLEU or ROUGE."""


CAUSAL_TASKS = (TaskKind.language_model, TaskKind.completion, TaskKind.sequence_to_sequence)
TEXT_TASKS = (TaskKind.language_model, TaskKind.masked_language_model)


class TextMetric(Enum):
    bleu = "bleu"
    rouge = "rouge"


@dataclass(kw_only=True)
class TaskConfig(ConfigGroup, prefix="task."):
    """The task. Every kind but language_model and masked_language_model reads samples, one per row unless they
    are packed (data.pack_samples)."""

    kind: TaskKind = TaskKind.language_model
    """What is predicted from what, and the metric."""
    mask_prob: float = bounded(0.15, above=0, below=1)
    """masked_language_model: probability that a token is to be predicted."""
    max_source_len: int = bounded(1024, least=1)
    """sequence_to_sequence: tokens of a source, which is truncated; data.seq_len is that of the target."""
    metric: TextMetric = TextMetric.bleu
    """sequence_to_sequence: bleu (sacreBLEU, for translation) or rouge (for summarization)."""
    beams: int = bounded(1, least=1, most=1024)
    """sequence_to_sequence: width of the beam search; 1 is greedy decoding."""
    stride: int = bounded(128, least=0)
    """question_answering: overlap in tokens of consecutive windows of a long context."""
    max_answer_tokens: int = bounded(30, least=1)
    """question_answering: maximum length of a predicted answer."""

    @property
    def is_causal(self) -> bool:
        """Whether the model must not attend to later tokens."""
        return self.kind in CAUSAL_TASKS

    @property
    def packs_text(self) -> bool:
        """Whether rows are cut from packed text; otherwise each holds one sample."""
        return self.kind in TEXT_TASKS
