"""Heads: masked language model, classification, question answering."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_helpers import EXACT, LOCAL, LSH, VOCAB, grads_of, random_tokens, relative_error, small_config
from torch import Tensor

from reformer_dist.config import CompatConfig, ModelConfig, Pooling, Recompute, StreamMerge
from reformer_dist.errors import ConfigError
from reformer_dist.models import ReformerForQuestionAnswering, ReformerForSequenceClassification, ReformerLM
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.question_answering import MASKED_LOGIT

TWO_SIDED: dict[str, Any] = {"causal": False, "layers": [LSH, LOCAL, EXACT], "n_layers": 3}
CONCAT = {"compat": CompatConfig(merge_streams=StreamMerge.concat)}
DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.2, "ff_dropout": 0.3}
N_CLASSES = 5
CLASSES = torch.tensor([3, 0, -100])
ANSWERS = torch.tensor([[4, 9], [0, 2], [-100, -100]])
MAKERS: dict[str, Callable[[ModelConfig], ReformerModel]] = {
    "masked": lambda config: ReformerLM(config, VOCAB),
    "classes": lambda config: ReformerForSequenceClassification(config, VOCAB, N_CLASSES),
    "answers": lambda config: ReformerForQuestionAnswering(config, VOCAB),
}


def labels_of(task: str, tokens: Tensor) -> Tensor:
    if task == "masked":
        return torch.where(torch.arange(tokens.shape[1]) % 5 == 0, tokens, -100)
    return CLASSES if task == "classes" else ANSWERS


def padding(seq_len: int = 37) -> Tensor:
    """Three rows, padded on the right, on the left, and not at all."""
    mask = torch.ones(3, seq_len, dtype=torch.bool)
    mask[0, 20:], mask[1, :9] = False, False
    return mask


@pytest.mark.parametrize("task", list(MAKERS))
def test_backward_is_that_of_plain_autograd(task: str) -> None:
    tokens = random_tokens(3)
    found = []
    for recompute in (Recompute.none, Recompute.reversible, Recompute.checkpoint):
        model = MAKERS[task](small_config(recompute=recompute, **TWO_SIDED, **DROPOUTS))
        loss = model(tokens, labels_of(task, tokens), key_padding_mask=padding(), step=1, dropout_seed=2)
        assert loss.dtype == torch.float32 and loss.shape == ()
        loss.backward()
        assert len(grads_of(model)) == len(list(model.parameters()))
        found.append(torch.cat([grad.flatten() for grad in grads_of(model).values()]))
    assert relative_error(found[1], found[0]) < 1e-5 and torch.equal(found[2], found[0])


@torch.no_grad()
def test_a_masked_language_model_attends_to_both_sides() -> None:
    model = ReformerLM(small_config(**TWO_SIDED), VOCAB).eval()
    tokens = random_tokens(3)
    edited = tokens.clone()
    edited[:, -1] += 1
    assert (model(edited % VOCAB)[:, 0] != model(tokens)[:, 0]).any()
    labels = labels_of("masked", tokens)
    expected = F.cross_entropy(model(tokens)[:, ::5].flatten(0, 1), tokens[:, ::5].flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, labels), expected)


@torch.no_grad()
@pytest.mark.parametrize("pooling", list(Pooling))
def test_classification(pooling: Pooling) -> None:
    config = small_config(pooling=pooling, **TWO_SIDED, **CONCAT)
    model = ReformerForSequenceClassification(config, VOCAB, N_CLASSES).eval()
    tokens, mask = random_tokens(3), padding()
    logits = model(tokens, key_padding_mask=mask)
    assert logits.shape == (3, N_CLASSES) and logits.dtype == torch.float32
    # the head by hand, on the hidden states of real tokens
    hidden = model.encode(tokens, key_padding_mask=mask)
    for row in range(3):
        real = hidden[row, mask[row]]
        pooled = {Pooling.mean: real.mean(dim=0), Pooling.first: real[0], Pooling.last: real[-1]}[pooling]
        expected = model.head.to_logits(torch.tanh(model.head.dense(pooled)))
        torch.testing.assert_close(logits[row], expected)
    expected_loss = F.cross_entropy(logits, CLASSES, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(model(tokens, CLASSES, key_padding_mask=mask), expected_loss)
    # tokens in the padding have no effect
    padded = torch.where(mask, tokens, 7)
    assert torch.equal(model(padded, key_padding_mask=mask), logits)


def test_first_token_pooling_needs_a_bidirectional_model() -> None:
    with pytest.raises(ConfigError, match=r"model\.pooling=first: .*model\.causal=false"):
        small_config(pooling=Pooling.first)
    config = small_config(pooling=Pooling.last, layers=[EXACT])
    model = ReformerForSequenceClassification(config, VOCAB, N_CLASSES).eval()
    edited = random_tokens(3)
    edited[:, 0] = (edited[:, 0] + 1) % VOCAB
    assert (model(edited) != model(random_tokens(3))).all()


@torch.no_grad()
def test_question_answering() -> None:
    model = ReformerForQuestionAnswering(small_config(**TWO_SIDED), VOCAB).eval()
    tokens, mask = random_tokens(3), padding()
    question = torch.zeros(3, 37, dtype=torch.bool)
    question[0, :3] = True
    options = {"key_padding_mask": mask, "answer_mask": ~question}
    ends = model(tokens, **options)
    assert all(logits.shape == (3, 37) and logits.dtype == torch.float32 for logits in ends)
    for logits in ends:
        assert torch.equal(logits == MASKED_LOGIT, question | ~mask)
    columns = ANSWERS + torch.tensor([[0], [9], [0]])  # positions of the second row start after its padding
    expected = sum(
        F.cross_entropy(logits, columns[:, end], reduction="sum", ignore_index=-100)
        for end, logits in enumerate(ends)
    )
    torch.testing.assert_close(model(tokens, ANSWERS, **options), expected)


def test_labels_at_masked_positions_are_ignored() -> None:
    """After the text, in its padding, in the question: their loss would be unbounded or infinite."""
    model = ReformerForQuestionAnswering(small_config(**TWO_SIDED), VOCAB).eval()
    tokens, mask = random_tokens(3), padding()
    answers = torch.arange(37).expand(3, -1) >= 10
    options = {"key_padding_mask": mask, "answer_mask": answers}
    # the first row has 20 tokens, the second starts after nine padded ones, so its first valid answer is at 1
    of_last = model(tokens, torch.tensor([[-100, 15], [-100, 1], [-100, 36]]), **options)
    assert of_last > 0
    for wrong in ([20, 0, 9], [9, 28, 0]):
        labels = torch.tensor([[first, last] for first, last in zip(wrong, [15, 1, 36], strict=True)])
        assert torch.equal(model(tokens, labels, **options), of_last)
    for value in (-1, 37, 10_000):
        labels[1, 0] = value
        with pytest.raises(ValueError, match=rf"labels={value}: .*\b0 to 36\b"):
            model(tokens, labels, **options)


def test_a_row_without_a_valid_answer_position_has_finite_gradients() -> None:
    model = ReformerForQuestionAnswering(small_config(**TWO_SIDED), VOCAB)
    nowhere = torch.ones(3, 37, dtype=torch.bool)
    nowhere[2] = False
    model(random_tokens(3), ANSWERS, answer_mask=nowhere, step=0).backward()
    assert all(grad.isfinite().all() for grad in grads_of(model).values())


@pytest.mark.parametrize("task", ["classes", "answers"])
def test_training_reduces_the_loss(task: str) -> None:
    """Classify the token below N_CLASSES at every fourth position, or find the position of one."""
    model = MAKERS[task](small_config(**TWO_SIDED | {"layers": [LSH, LOCAL], "n_layers": 2}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for step in range(80):
        tokens = torch.randint(N_CLASSES, VOCAB, (12, 35), generator=draw)
        where, which = (torch.randint(0, end, (12,), generator=draw) for end in (35, N_CLASSES))
        if task == "classes":
            tokens[:, ::4], labels = which.unsqueeze(1), which
        else:
            tokens[torch.arange(12), where], labels = which, where.unsqueeze(1).expand(-1, 2)
        loss = model(tokens, labels, step=step) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < losses[0] / 2


def test_dropout_of_the_head_is_a_function_of_row_and_seed() -> None:
    """Micro-batches and slices must draw the same masks as the whole batch."""
    model = MAKERS["classes"](small_config(**TWO_SIDED | DROPOUTS))
    tokens = random_tokens(3)
    whole = model(tokens, step=0, dropout_seed=1)
    torch.testing.assert_close(model(tokens[1:], step=0, dropout_seed=1, rows=torch.tensor([1, 2])), whole[1:])
    assert not torch.equal(model(tokens, step=0, dropout_seed=2), whole)
    other = dataclasses.replace(model.config, dropout=0.0)
    plain = MAKERS["classes"](other)
    assert not torch.equal(plain(tokens, step=0, dropout_seed=1), whole)
