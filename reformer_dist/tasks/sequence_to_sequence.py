"""Sequence to sequence: a target is written for a source, such as a translation or a summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from reformer_dist.config import TextMetric
from reformer_dist.data import Corpus, Example, Sample, DrawKey, collate
from reformer_dist.generation import BeamOptions, beam_search, make_decoder
from reformer_dist.models import ReformerEncoderDecoder
from reformer_dist.tasks.metrics import bleu, rouge
from reformer_dist.tasks.base import Gather, Rows, SampleTask, device_of, row_of

SHOWN = 3


class SequenceToSequence(SampleTask):
    """The source ends with an end of text; the target begins and ends with one. What is too long is cut."""

    needs = ("source", "target")
    make_shards_args = "--source FILE --target FILE"

    def build_model(self) -> nn.Module:
        return ReformerEncoderDecoder(self.config.model, self.vocab_size, self.config.trainer.seed)

    def example(self, sample: Sample, visit: DrawKey) -> Example:
        eos, (source, target) = [self.tokenizer.eos_id], sample.fields
        source = row_of(source[: self.config.task.max_source_len - 1], eos)
        target = row_of(eos, target, eos)[: self.config.data.seq_len + 1]
        return {
            "source": source,
            "source_mask": np.ones(len(source), dtype=bool),
            "tokens": target[:-1],
            "key_padding_mask": np.ones(len(target) - 1, dtype=bool),
            "labels": target[1:],
        }

    @torch.no_grad()
    def measure(self, model: nn.Module, corpus: Corpus, rows: Rows, gather: Gather) -> list[str]:
        written: list[tuple[str, str, str]] = []
        samples = self.samples(corpus, rows)
        while some := list(islice(samples, rows.micro_batch)):
            outputs = self.write(model, some)
            texts = ([self.tokenizer.decode(field) for field in sample.fields] for sample in some)
            written += [(source, target, out) for (source, target), out in zip(texts, outputs, strict=True)]
        written = gather(written)
        references, hypotheses = [each[1] for each in written], [each[2] for each in written]
        lines = [f"samples: {len(written):,}", *self._scores(hypotheses, references)]
        for source, target, out in written[:SHOWN]:
            lines += [f"  source:  {_short(source)}", f"  target:  {_short(target)}", f"  written: {_short(out)}"]
        return lines

    def write(self, model: nn.Module, samples: Sequence[Sample]) -> list[str]:
        """What the model writes for the sources of samples: by beam search if task.beams is above 1."""
        assert isinstance(model, ReformerEncoderDecoder)
        n_tokens = self.config.data.seq_len
        if self.config.task.beams == 1:
            written = self._likeliest(model, samples, n_tokens)
        else:
            written = [self._search(model, sample, n_tokens) for sample in samples]
        return [self.tokenizer.decode(tokens).strip() for tokens in written]

    def _likeliest(
        self, model: ReformerEncoderDecoder, samples: Sequence[Sample], n_tokens: int
    ) -> list[list[int]]:
        """The most probable token at each step, for all samples together."""
        eos, device = self.tokenizer.eos_id, device_of(model)
        decoder = make_decoder(self._reading(model, samples), self.config.model)
        logits = decoder.prefill(torch.full((len(samples), 1), eos, device=device))
        tokens: list[Tensor] = []
        ended = torch.zeros(len(samples), dtype=torch.bool, device=device)
        while True:
            tokens.append(logits.argmax(-1).masked_fill(ended, eos))
            ended |= tokens[-1] == eos
            if bool(ended.all()) or len(tokens) == n_tokens:
                return torch.stack(tokens, dim=1).tolist()
            logits = decoder.step(tokens[-1])

    def begin(self, model: nn.Module, prompts: Sequence[Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """(language model of the targets, what each begins with) for sources [S] behind an end of text."""
        assert isinstance(model, ReformerEncoderDecoder)
        nothing = np.zeros(0, np.int64)
        samples = [Sample("", (prompt[1:].cpu().numpy(), nothing)) for prompt in prompts]
        return self._reading(model, samples), [prompt[:1] for prompt in prompts]

    def _search(self, model: ReformerEncoderDecoder, sample: Sample, n_tokens: int) -> list[int]:
        eos, device = self.tokenizer.eos_id, device_of(model)
        decoder = make_decoder(self._reading(model, [sample]), self.config.model)
        options = BeamOptions(self.config.task.beams)
        prompt = torch.tensor([eos], device=device)
        return beam_search(decoder, prompt, n_tokens, options, lambda tokens: tokens[-1] == eos)[0].tokens

    def _reading(self, model: ReformerEncoderDecoder, samples: Sequence[Sample]) -> Callable[..., Tensor]:
        """The language model of the targets of samples."""
        batch, device = collate([self.example(sample, (0, 0, 0)) for sample in samples]), device_of(model)
        return model.conditioned_on(batch["source"].to(device), batch["source_mask"].to(device))

    def _scores(self, hypotheses: Sequence[str], references: Sequence[str]) -> list[str]:
        if self.config.task.metric is TextMetric.rouge:
            return [f"{name}: {score:.2f}" for name, score in rouge(hypotheses, references).items()]
        score, signature = bleu(hypotheses, references)
        return [f"sacreBLEU: {score:.2f}", f"  signature: {signature}"]


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 100 else f"{words[:97]}..."
