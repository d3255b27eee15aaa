"""Tasks: the inputs, labels and model of a run, and its evaluation.

`base` is the interface. Each TaskKind has a file of the same name. `text_metrics` has the metrics of generated
texts and answers.
"""

from collections.abc import Sequence

from reformer_dist.config import RunConfig, TaskKind
from reformer_dist.data import Tokenizer
from reformer_dist.tasks.base import Task
from reformer_dist.tasks.completion import Completion
from reformer_dist.tasks.language_model import LanguageModel
from reformer_dist.tasks.masked_language_model import MaskedLanguageModel
from reformer_dist.tasks.question_answering import QuestionAnswering
from reformer_dist.tasks.sequence_classification import SequenceClassification
from reformer_dist.tasks.sequence_to_sequence import SequenceToSequence

TASKS: dict[TaskKind, type[Task]] = {
    TaskKind.language_model: LanguageModel,
    TaskKind.masked_language_model: MaskedLanguageModel,
    TaskKind.completion: Completion,
    TaskKind.sequence_classification: SequenceClassification,
    TaskKind.question_answering: QuestionAnswering,
    TaskKind.sequence_to_sequence: SequenceToSequence,
}


def make_task(config: RunConfig, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> Task:
    """The task of config.task.kind. labels: of its dataset, for classification."""
    return TASKS[config.task.kind](config, tokenizer, labels)


__all__ = ["SequenceToSequence", "Task", "make_task"]
