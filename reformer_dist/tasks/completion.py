"""Completion: a causal model of samples whose last field is asked for, such as the second half of a copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reformer_dist.data import IGNORE_INDEX, Example, Sample, DrawKey
from reformer_dist.models import ReformerLM
from reformer_dist.tasks.base import SampleTask, row_of


class Completion(SampleTask):
    """A row is prompt, end of text, completion, end of text; the last two are asked for."""

    needs = ("prompt", "completion")
    make_shards_args = "FILE.jsonl --fields prompt completion"

    def build_model(self) -> nn.Module:
        return ReformerLM(self.config.model, self.vocab_size, self.config.trainer.seed)

    def example(self, sample: Sample, visit: DrawKey) -> Example:
        """What is too long loses the beginning of its prompt; the completion its end, if it alone is."""
        seq_len, eos = self.config.data.seq_len, [self.tokenizer.eos_id]
        prompt, completion = sample.fields
        asked = row_of(completion, eos)[: seq_len - 1]
        given = row_of(eos, prompt, eos)[-(seq_len - len(asked) + 1) :]
        labels = row_of([IGNORE_INDEX] * (len(given) - 1), asked)
        return {"tokens": row_of(given, asked[:-1]), "labels": labels}

    @property
    def token_bytes(self) -> Tensor | None:
        return torch.from_numpy(self.tokenizer.token_bytes)
