"""Completion: a causal language model of the text after a prompt, such as a copy of it."""

from __future__ import annotations

from torch import nn

from reformer_dist.data import IGNORE_INDEX, DrawKey, Example, Sample
from reformer_dist.models import ReformerLM
from reformer_dist.tasks.base import SampleTask, concat_ids


class Completion(SampleTask):
    """Rows are end-of-text, prompt, end-of-text, completion. Labels are the completion and a final end-of-text."""

    field_names = ("prompt", "completion")
    make_shards_args = "FILE.jsonl --fields prompt completion"
    reports_bits_per_byte = True

    def build_model(self) -> nn.Module:
        return ReformerLM(self.config.model, self.vocab_size, self.config.trainer.seed)

    def encode(self, sample: Sample, draw_key: DrawKey) -> Example:
        """Rows that are too long lose the beginning of the prompt, and then the end of the completion."""
        seq_len, eos = self.config.data.seq_len, [self.tokenizer.eos_id]
        prompt, completion = sample.fields
        targets = concat_ids(completion, eos)[: seq_len - 1]
        context = concat_ids(eos, prompt, eos)[-(seq_len - len(targets) + 1) :]
        labels = concat_ids([IGNORE_INDEX] * (len(context) - 1), targets)
        return {"tokens": concat_ids(context, targets[:-1]), "labels": labels}
