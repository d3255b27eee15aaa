"""Sequence to sequence: a target is generated from a source, such as a translation or a summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from reformer_dist.config import TextMetric
from reformer_dist.data import Corpus, DrawKey, Example, RowSelection, Sample, collate
from reformer_dist.generation import BeamOptions, Hypothesis, beam_search, make_decoder
from reformer_dist.models import ReformerEncoderDecoder
from reformer_dist.tasks.base import AllGather, SampleTask, TaskMetrics, concat_ids, device_of
from reformer_dist.tasks.text_metrics import bleu, rouge

SHOWN_SAMPLES = 3


class SequenceToSequence(SampleTask):
    """Sources end with end-of-text, targets begin and end with it. Both are truncated to a maximum length."""

    field_names = ("source", "target")
    shards_args = "--source FILE --target FILE"

    def build_model(self) -> nn.Module:
        return ReformerEncoderDecoder(self.config.model, self.vocab_size, self.config.trainer.seed)

    def encode(self, sample: Sample, draw_key: DrawKey) -> Example:
        eos, (source, target) = [self.tokenizer.eos_id], sample.fields
        source = concat_ids(source[: self.config.task.max_source_len - 1], eos)
        target = concat_ids(eos, target, eos)[: self.config.data.seq_len + 1]
        return {
            "source": source,
            "source_mask": np.ones(len(source), dtype=bool),
            "tokens": target[:-1],
            "key_padding_mask": np.ones(len(target) - 1, dtype=bool),
            "labels": target[1:],
        }

    @torch.no_grad()
    def measure(self, model: nn.Module, corpus: Corpus, rows: RowSelection, gather: AllGather) -> TaskMetrics:
        results: list[tuple[str, str, str]] = []
        samples = self.samples(corpus, rows)
        while group := list(islice(samples, rows.micro_batch_size)):
            outputs = self.generate(model, group)
            texts = ([self.tokenizer.decode(field) for field in sample.fields] for sample in group)
            results += [(source, target, out) for (source, target), out in zip(texts, outputs, strict=True)]
        results = gather(results)
        references, hypotheses = [target for _, target, _ in results], [out for _, _, out in results]
        scores = self._scores(hypotheses, references)
        lines = [f"samples: {len(results):,}", *scores.lines]
        for source, target, out in results[:SHOWN_SAMPLES]:
            lines += [f"  source:  {_short(source)}", f"  target:  {_short(target)}", f"  written: {_short(out)}"]
        return TaskMetrics(scores.values, lines)

    def generate(self, model: nn.Module, samples: Sequence[Sample]) -> list[str]:
        """Texts generated for the sources of samples: greedily, or by beam search if task.beams is above 1."""
        return [self.text_of(target) for target in self.targets(model, samples)]

    def text_of(self, target: Hypothesis) -> str:
        return self.tokenizer.decode(target.tokens).strip()

    @torch.no_grad()
    def targets(self, model: nn.Module, samples: Sequence[Sample]) -> list[Hypothesis]:
        """Targets generated for the sources of samples; their scores are mean log-probabilities of tokens."""
        assert isinstance(model, ReformerEncoderDecoder)
        n_tokens = self.config.data.seq_len
        if self.config.task.beams == 1:
            return self._greedy(model, samples, n_tokens)
        return [self._beam_search(model, sample, n_tokens) for sample in samples]

    def _greedy(self, model: ReformerEncoderDecoder, samples: Sequence[Sample], n_tokens: int) -> list[Hypothesis]:
        """The most probable token at each step after end-of-text, at most n_tokens."""
        eos, device = self.tokenizer.eos_id, device_of(model)
        decoder = make_decoder(self._conditioned(model, samples), self.config.model)
        logits = decoder.prefill(torch.full((len(samples), 1), eos, device=device))
        tokens: list[Tensor] = []
        total = torch.zeros(len(samples), device=device)
        ended = torch.zeros(len(samples), dtype=torch.bool, device=device)
        while True:
            best, newest = logits.float().log_softmax(-1).max(-1)
            total += best.masked_fill(ended, 0.0)
            tokens.append(newest.masked_fill(ended, eos))
            ended |= tokens[-1] == eos
            if bool(ended.all()) or len(tokens) == n_tokens:
                return [
                    _until(eos, row, score)
                    for row, score in zip(torch.stack(tokens, dim=1).tolist(), total.tolist(), strict=True)
                ]
            logits = decoder.step(tokens[-1])

    def condition(self, model: nn.Module, prompts: Sequence[Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """(language model of the targets, first tokens of each) for sources [S] after an end-of-text token."""
        assert isinstance(model, ReformerEncoderDecoder)
        empty = np.zeros(0, np.int64)
        samples = [Sample("", (prompt[1:].cpu().numpy(), empty)) for prompt in prompts]
        return self._conditioned(model, samples), [prompt[:1] for prompt in prompts]

    def _beam_search(self, model: ReformerEncoderDecoder, sample: Sample, n_tokens: int) -> Hypothesis:
        eos, device = self.tokenizer.eos_id, device_of(model)
        decoder = make_decoder(self._conditioned(model, [sample]), self.config.model)
        options = BeamOptions(self.config.task.beams)
        prompt = torch.tensor([eos], device=device)
        return beam_search(decoder, prompt, n_tokens, options, lambda tokens: tokens[-1] == eos)[0]

    def _conditioned(self, model: ReformerEncoderDecoder, samples: Sequence[Sample]) -> Callable[..., Tensor]:
        """Language model of the targets, conditioned on the sources of samples."""
        batch, device = collate([self.encode(sample, DrawKey(0, 0, 0)) for sample in samples]), device_of(model)
        return model.conditioned_on(batch["source"].to(device), batch["source_mask"].to(device))

    def _scores(self, hypotheses: Sequence[str], references: Sequence[str]) -> TaskMetrics:
        if self.config.task.metric is TextMetric.rouge:
            scores = rouge(hypotheses, references)
            values = {name.lower().replace("-", "_"): score for name, score in scores.items()}
            return TaskMetrics(values, [f"{name}: {score:.2f}" for name, score in scores.items()])
        score, signature = bleu(hypotheses, references)
        return TaskMetrics({"bleu": score}, [f"sacreBLEU: {score:.2f}", f"  signature: {signature}"])


def _until(end: int, tokens: list[int], total: float) -> Hypothesis:
    """The tokens up to the first end token, scored by their mean log-probability."""
    n_tokens = tokens.index(end) + 1 if end in tokens else len(tokens)
    return Hypothesis(tokens[:n_tokens], total / n_tokens)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:97]}..."
