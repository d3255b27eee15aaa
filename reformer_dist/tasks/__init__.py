"""What a run trains on and is measured by: a file for each kind of task."""

from collections.abc import Sequence

from reformer_dist.config import RunConfig, TaskKind
from reformer_dist.data import Tokenizer
from reformer_dist.tasks.sequence_classification import SequenceClassification
from reformer_dist.tasks.completion import Completion
from reformer_dist.tasks.language_model import LanguageModel, MaskedLanguageModel
from reformer_dist.tasks.question_answering import QuestionAnswering
from reformer_dist.tasks.sequence_to_sequence import SequenceToSequence
from reformer_dist.tasks.base import HeldoutBatch, Rows, Task

KINDS: dict[TaskKind, type[Task]] = {
    TaskKind.language_model: LanguageModel,
    TaskKind.masked_language_model: MaskedLanguageModel,
    TaskKind.completion: Completion,
    TaskKind.sequence_classification: SequenceClassification,
    TaskKind.question_answering: QuestionAnswering,
    TaskKind.sequence_to_sequence: SequenceToSequence,
}


def make_task(config: RunConfig, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> Task:
    """The task of config.task.kind; `labels` are those of its data set, where it classifies."""
    return KINDS[config.task.kind](config, tokenizer, labels)


__all__ = ["HeldoutBatch", "Rows", "SequenceToSequence", "Task", "make_task"]
