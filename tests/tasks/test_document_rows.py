"""Rows of text whose documents do not see one another: inputs, loss, evaluation, prompts, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_config
from task_data import make

from reformer_dist.data import (
    IGNORE_INDEX,
    Corpus,
    DrawKey,
    RowSelection,
    Sampler,
    Span,
    document_ids,
    pack_spans,
    positions_in_documents,
)
from reformer_dist.data.loading.packing import TokenStream
from reformer_dist.diagnostics.context_windows import cut_rows
from reformer_dist.diagnostics.coverage import measure_layers
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import ConfigError
from reformer_dist.generation.decoder import last_document
from reformer_dist.models import ReformerLM
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.evaluation import evaluate

EOS = 256
APART = (
    "data.mask_documents=true",
    "data.reset_position_ids=true",
    "data.seq_len=2048",
    "model.axial_shape=[32,64]",
)
MODEL = ("model.layers=[local,lsh,exact]", "model.n_layers=3", "model.head_dim=16", "model.next_value_heads=1")


def spans_of_row(data: Path, number: int = 0, seq_len: int = 2048) -> list[Span]:
    """Spans of a row that begins and ends within documents, at number > 0."""
    from reformer_dist.data import SampleReader

    sampler = Sampler(Corpus.open([data]), seed=0, batch_size=1, seq_len=seq_len)
    stream, reader = TokenStream(sampler, 0), SampleReader()
    for _ in range(number):
        stream.next_spans(0, lambda _, ref: reader.read(ref))
    return stream.next_spans(0, lambda _, ref: reader.read(ref))


def test_each_document_begins_with_what_precedes_it(tiny_data: Path) -> None:
    spans = spans_of_row(tiny_data, 1)
    assert len(spans) > 2 and spans[0].start > 0
    tokens, labels = pack_spans(spans, 2048, EOS, separate=True)
    ids = document_ids(spans, 2048)
    positions = positions_in_documents(ids)
    for number, span in enumerate(spans):
        own = ids == number
        before = [EOS] if span.start == 0 else span.tokens[span.start - 1 : span.start].tolist()
        assert tokens[:-1][own].tolist() == before + span.tokens[span.start : span.stop - 1].tolist()
        assert labels[own].tolist() == span.tokens[span.start : span.stop].tolist()
        assert positions[own].tolist() == list(range(span.stop - span.start))


def test_a_cut_at_the_end_of_a_range_is_no_predecessor(tiny_data: Path) -> None:
    """A stream's range may end within a document; what follows there is another place of the data."""
    first, second = spans_of_row(tiny_data)[:2]
    cut = Span(first.dataset_index, first.ref, 0, 5, first.tokens)
    later = Span(second.dataset_index, second.ref, 3, 9, second.tokens)
    tokens, labels = pack_spans([cut, later], 12, EOS, separate=True)
    assert tokens[5] == second.tokens[2] != first.tokens[4]
    assert labels[4] == first.tokens[4]
    assert document_ids([cut, later], 12).tolist() == [0] * 5 + [1] * 6 + [2]


def test_the_loss_is_that_of_each_document_alone(tiny_data: Path) -> None:
    task = make("language_model", tiny_data, *APART, *MODEL, "model.dropout=0")
    spans = spans_of_row(tiny_data, 1)
    example = task.make_example(spans, DrawKey.heldout(0))
    torch.manual_seed(0)
    model = task.build_model()
    with torch.no_grad():  # attention hardly matters at initialization
        for name, weight in model.named_parameters():
            weight.mul_(5 if name.endswith(("to_out.weight", "head.weight")) else 1)
    given = {name: torch.from_numpy(x).unsqueeze(0) for name, x in example.items()}
    loss = model(**given, step=2)
    alone = []
    for number in range(len(spans)):
        own = example["document_ids"] == number
        tokens, labels = (torch.from_numpy(example[name][own]).unsqueeze(0) for name in ("tokens", "labels"))
        alone.append(model(tokens, labels, step=2))
    torch.testing.assert_close(loss, torch.stack(alone).sum(), rtol=1e-6, atol=0)
    without = {name: given[name] for name in ("tokens", "labels")}
    assert not torch.allclose(loss, model(**without, step=2), rtol=1e-4)


def test_masked_text_has_documents_too(tiny_data: Path) -> None:
    task = make("masked_language_model", tiny_data, *APART, "model.causal=false")
    spans = spans_of_row(tiny_data, 1)
    example = task.make_example(spans, DrawKey.heldout(0))
    for number, span in enumerate(spans):
        own = example["document_ids"] == number
        is_label = example["labels"][own] != IGNORE_INDEX
        assert (example["labels"][own] == span.tokens[span.start : span.stop])[is_label].all()
        assert len(example["tokens"][own]) == span.stop - span.start


def test_heldout_rows_and_loss_by_position_in_documents(tiny_data: Path, job: Runtime) -> None:
    task = make("language_model", tiny_data, *APART, *MODEL)
    corpus, sequence = Corpus.open([tiny_data]), SlicedSequence(make_mesh(job, 1, 1), 2048)
    batches = list(task.heldout(corpus, RowSelection()))
    documents = sum(int(batch["document_ids"][0].max()) for batch in batches)
    assert documents >= corpus.total("samples", "heldout")
    model = task.build_model().eval()
    result = evaluate(model, batches, task, job, sequence, by_position=True)
    rows = [(positions_in_documents(b["document_ids"].numpy()), b["labels"].numpy() >= 0) for b in batches]
    longest = max(positions[is_text].max() for positions, is_text in rows)
    assert result.positions[-1].first <= longest <= result.positions[-1].last
    assert sum(part.n_labels for part in result.positions) == result.n_labels == corpus.total("tokens", "heldout")
    by_row = evaluate(model, batches, task, job, sequence)
    assert by_row.loss == pytest.approx(result.loss)


def test_windows_of_context_and_coverage_keep_documents_apart(tiny_data: Path, job: Runtime) -> None:
    task = make("language_model", tiny_data, *APART, *MODEL)
    corpus, sequence = Corpus.open([tiny_data]), SlicedSequence(make_mesh(job, 1, 1), 2048)
    batches = list(task.heldout(corpus, RowSelection()))
    model = task.build_model().eval()
    assert isinstance(model, ReformerLM)
    whole = evaluate(model, batches, task, job, sequence)
    windows = list(cut_rows(batches, 256, 4))
    assert all(batch["position_ids"].max() < 256 and (batch["position_ids"][:, 0] == 0).all() for batch in windows)
    cut = evaluate(model, windows, task, job, sequence)
    assert cut.n_labels == whole.n_labels and cut.loss != whole.loss
    apart = measure_layers(model, batches)
    together = measure_layers(model, [{name: b[name] for name in ("tokens", "labels")} for b in batches])
    assert apart[0]["pairs"] > together[0]["pairs"]  # a window covers more of a document than of a row


def test_the_last_document_of_a_prompt() -> None:
    assert last_document(torch.tensor([EOS, 1, EOS, 2, 3]), EOS).tolist() == [EOS, 2, 3]
    assert last_document(torch.tensor([1, 2]), EOS).tolist() == [1, 2]
    assert last_document(torch.tensor([1, EOS]), EOS).tolist() == [EOS]


def test_positions_in_documents() -> None:
    ids = np.array([[0, 0, 0, 4, 4, 9], [2, 2, 2, 2, 2, 2]])
    assert positions_in_documents(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["task.kind=completion", "data.mask_documents=true"],
            r"data\.mask_documents=true: .*task\.kind=completion",
        ),
        (["data.pack_samples=true"], r"data\.pack_samples=true: .*language_model"),
        (
            ["task.kind=sequence_to_sequence", "task.max_source_len=64", "data.pack_samples=true"],
            r"data\.pack_samples=true: .*source",
        ),
        (
            ["task.kind=question_answering", "model.causal=false", "data.pack_samples=true"],
            r"data\.pack_samples=true: .*question_answering",
        ),
        (
            ["task.kind=sequence_classification", "model.causal=false", "data.pack_samples=true"],
            r"data\.pack_samples=true: .*sequence_classification",
        ),
        (["data.reset_position_ids=true"], r"data\.reset_position_ids=True: .*data\.mask_documents"),
        (
            ["data.mask_documents=true", "model.neighbours=chunk"],
            r"data\.mask_documents=true: .*neighbours=window",
        ),
        (
            ["task.kind=completion", "data.pack_samples=true", "model.compat.local_chunk_len=8"],
            r"data\.pack_samples=true: .*local_chunk_len=0",
        ),
    ],
)
def test_what_can_not_keep_documents_apart_is_refused(changed: list[str], message: str, tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_data, Path("unused"), *changed)
