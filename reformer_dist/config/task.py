"""What a model is trained for: what it reads, what it is asked for, and by what it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from reformer_dist.config.checks import at_least, check_types, require


class TaskKind(Enum):
    language_model = "language_model"
    """The next token of a text; bits per byte."""
    masked_language_model = "masked_language_model"
    """Tokens of a text that were hidden from it; accuracy."""
    completion = "completion"
    """The last field of a sample, token by token behind the others; accuracy of its tokens."""
    sequence_classification = "sequence_classification"
    """Which label a text has; accuracy."""
    question_answering = "question_answering"
    """Where in a context the answer to a question lies; exact match and F1."""
    sequence_to_sequence = "sequence_to_sequence"
    """A target that is written for a source; BLEU or ROUGE."""


CAUSAL = (TaskKind.language_model, TaskKind.completion, TaskKind.sequence_to_sequence)
OF_TEXT = (TaskKind.language_model, TaskKind.masked_language_model)


class TextMetric(Enum):
    bleu = "bleu"
    rouge = "rouge"


@dataclass(kw_only=True)
class TaskConfig:
    """The task; every kind but language_model and masked_language_model reads one sample in a row, unpacked."""

    kind: TaskKind = TaskKind.language_model
    mask_prob: float = 0.15
    """masked_language_model: share of the tokens that are asked for."""
    max_source_len: int = 1024
    """sequence_to_sequence: tokens of a source, the rest is cut off; data.seq_len is that of the target."""
    metric: TextMetric = TextMetric.bleu
    """sequence_to_sequence: bleu (sacreBLEU, for translations) or rouge (for summaries)."""
    beams: int = 1
    """sequence_to_sequence: beginnings that a search keeps when the model writes; 1 takes the likeliest token."""
    stride: int = 128
    """question_answering: tokens that windows of a long context share with the next."""
    max_answer_tokens: int = 30
    """question_answering: the longest answer that is given."""

    def __post_init__(self) -> None:
        check_types(self, "task")
        require(0 < self.mask_prob < 1, "task.mask_prob", self.mask_prob, "must be above 0 and below 1")
        at_least(1, task__max_source_len=self.max_source_len, task__max_answer_tokens=self.max_answer_tokens)
        at_least(1, task__beams=self.beams)
        at_least(0, task__stride=self.stride)

    @property
    def is_causal(self) -> bool:
        """Whether the model must not see what follows."""
        return self.kind in CAUSAL

    @property
    def packs_text(self) -> bool:
        """Whether rows are cut from running text; else each holds one sample."""
        return self.kind in OF_TEXT
