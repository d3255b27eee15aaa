"""Predictor: each prediction is that of the task's own evaluation, in batches as one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_data import WORDS, make, write_for, write_pairs

from reformer_dist.data import ByteTokenizer, Corpus, DrawKey, RowSelection, collate
from reformer_dist.errors import ConfigError
from reformer_dist.inference.predictor import METHODS, Predictor
from reformer_dist.run.pretrained import LoadedModel
from reformer_dist.tasks import Completion

BYTES = ByteTokenizer()
TWO_SIDED = ("model.causal=false", "model.position=rotary")


def predictor(kind: str, *changed: str, fields: tuple[str, ...] = ()) -> Predictor:
    """With random weights, whose predictions differ more than those of a model that was trained for seconds."""
    labels = tuple(WORDS) if kind == "sequence_classification" else ()
    task = make(kind, Path("unused"), *changed, labels=labels)
    model = task.build_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return Predictor(LoadedModel(model, task, task.config, BYTES, Path("some-run"), 0, list(fields)))


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-4, rtol=1e-4)


def test_classes_are_those_of_evaluation(tmp_path: Path) -> None:
    corpus = Corpus.open([write_for("sequence_classification", tmp_path / "data")])
    model = predictor("sequence_classification", *TWO_SIDED)
    rows = RowSelection(8, 4)
    samples = list(model.task.samples(corpus, rows))  # type: ignore[attr-defined]
    expected = []
    with torch.no_grad():
        for batch in model.task.heldout(corpus, rows):
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            expected += model.model(**inputs).argmax(-1).tolist()
    texts = [BYTES.decode(sample.fields[0]) for sample in samples]
    found = model.classify(texts, batch_size=3)
    assert [each.label for each in found] == [WORDS[index] for index in expected[: len(texts)]]
    assert len({each.score for each in found}) > 1
    for text, each in zip(texts, found, strict=True):
        alone = model.classify(text)
        assert alone.label == each.label and sum(each.scores.values()) == pytest.approx(1)
        close(list(alone.scores.values()), list(each.scores.values()))


def test_answers_are_those_of_evaluation_and_at_their_offsets(tmp_path: Path) -> None:
    corpus = Corpus.open([write_for("question_answering", tmp_path / "data")])
    model = predictor("question_answering", *TWO_SIDED, "task.stride=8")
    samples = list(model.task.samples(corpus, RowSelection(6, 2)))  # type: ignore[attr-defined]
    questions, contexts = ([BYTES.decode(s.fields[part]) for s in samples] for part in (0, 1))
    found = model.answer(questions, contexts)
    # with the found texts as the truth, evaluation must agree with all of them
    for sample, answer, context in zip(samples, found, contexts, strict=True):
        sample.metadata["answers"] = [[0, answer.text]]
        assert context[answer.start : answer.end] == answer.text
    model.task.samples = lambda *_: iter(samples)  # type: ignore[attr-defined]
    measures = model.task.measure(model.model, corpus, RowSelection(6, 2), lambda local: local)
    assert measures.values["exact_match"] == 100
    about_one = model.answer(questions[:2], contexts[0])
    assert about_one[0].text == found[0].text == model.answer(questions[0], contexts[0]).text
    # offsets are in characters
    answer = model.answer("é", "é中 " + contexts[0])
    assert ("é中 " + contexts[0])[answer.start : answer.end] == answer.text
    with pytest.raises(ConfigError, match=r"context: has 3 texts for 2 questions"):
        model.answer(questions[:2], contexts[:3])


def test_a_completion_follows_an_end_of_text_if_it_was_a_field_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the rows that the model was trained on."""
    data = write_pairs(tmp_path / "data")
    for fields in (("text",), ("source", "target")):
        model = predictor("completion", "data.seq_len=128", "model.max_seq_len=128", fields=fields)
        task = model.task
        assert isinstance(task, Completion)
        sample = next(iter(task.samples(Corpus.open([data]), RowSelection(1, 1))))
        example = task.encode(replace(sample, fields=sample.fields[: len(fields)]), DrawKey.heldout(0))
        tokens = example["tokens"][: len(sample.fields[0]) + len(fields)]
        with torch.no_grad():
            expected = []
            for _ in range(6):
                logits = model.model(torch.from_numpy(np.append(tokens, expected)).long()[None])
                expected.append(int(logits[0, -1].argmax()))
        found = model.generate(BYTES.decode(sample.fields[0]), max_new_tokens=6, temperature=0.0)
        assert found == BYTES.decode(expected[: [*expected, BYTES.eos_id].index(BYTES.eos_id)])


def test_masks_are_filled_with_the_likeliest_tokens() -> None:
    model = predictor("masked_language_model", *TWO_SIDED)
    texts = ["re<mask> gr<mask>en blue", "whi<mask>e", "no <mask><mask>"]
    found = model.fill_mask(texts, top_k=3, batch_size=2)
    for text, filled in zip(texts, found, strict=True):
        ids = [*[id for part in text.split("<mask>") for id in (257, *part.encode())][1:], 256]
        with torch.no_grad():
            logits = model.model(torch.tensor([ids]))[0, torch.tensor(ids) == 257]
        best = logits[:, :257].topk(3)
        assert [[c.text for c in mask] for mask in filled.masks] == [
            [BYTES.decode([id]) for id in row] for row in best.indices.tolist()
        ]
        close(
            [[c.score for c in mask] for mask in filled.masks],
            logits.softmax(-1).gather(1, best.indices).tolist(),
        )
        assert model.fill_mask(text, top_k=3).text == filled.text and "<mask>" not in filled.text
    assert model.fill_mask("a[?]", mask="[?]").text.startswith("a")
    with pytest.raises(ConfigError, match=r"text='plain': has no <mask>"):
        model.fill_mask("plain")


@pytest.mark.parametrize("beams", [1, 2])
def test_targets_are_those_of_evaluation(tmp_path: Path, beams: int) -> None:
    corpus = Corpus.open([write_pairs(tmp_path / "pairs")])
    changed = ("data.seq_len=16", "task.max_source_len=64", f"task.beams={beams}")
    model = predictor("sequence_to_sequence", *changed)
    samples = list(model.task.samples(corpus, RowSelection(4, 4)))  # type: ignore[attr-defined]
    sources = [BYTES.decode(sample.fields[0]) for sample in samples]
    found = model.write(sources, batch_size=3)
    assert [each.text for each in found] == model.task.generate(model.model, samples)  # type: ignore[attr-defined]
    alone = model.write(sources[0])
    assert alone.text == found[0].text
    close(alone.score, found[0].score)
    # the score is that of the model, teacher-forced
    target = model.task.targets(model.model, samples[:1])[0]  # type: ignore[attr-defined]
    row = collate([{"source": np.array([*sources[0].encode(), 256]), "tokens": np.array([256, *target.tokens])}])
    with torch.no_grad():
        labels = row["tokens"][:, 1:]
        loss = model.model(row["source"], row["tokens"][:, :-1], labels)
    close(-float(loss) / labels.numel(), target.score)
    with pytest.raises(ConfigError, match="source=' ': is empty"):
        model.write(" ")


@pytest.mark.parametrize("kind", ["language_model", "completion"])
def test_scores_are_the_loss_of_the_row(kind: str) -> None:
    model = predictor(kind, "data.seq_len=32")
    texts = ["x" * 32, "red green blue", "no"]
    scores = model.score(texts, batch_size=2)
    for text, score in zip(texts, scores, strict=True):
        labels = list(text.encode())
        row = torch.tensor([[256, *labels[:-1]]])
        with torch.no_grad():
            close(-score.log_prob, float(model.model(row, torch.tensor([labels]))))
        assert score.n_tokens == score.n_bytes == len(text)
        assert score.bits_per_byte == pytest.approx(np.log2(score.perplexity))
        close(model.score(text).log_prob, score.log_prob)
    with pytest.raises(ConfigError, match="text='': has no tokens"):
        model.score("")
    with pytest.raises(ConfigError, match=r"text: has 129 tokens.* 128"):
        model.score("x" * 129)


def test_embeddings_are_means_of_hidden_states() -> None:
    for kind, changed in (("language_model", ()), ("sequence_classification", TWO_SIDED)):
        model = predictor(kind, *changed)
        long, short = model.embed(["a text of some words", "no"])
        ids = [256, *b"no"] if kind == "language_model" else [*b"no", 256]
        with torch.no_grad():
            hidden = model.model.encode(torch.tensor([ids]))  # type: ignore[operator]
        close(short.tolist(), hidden[0].mean(dim=0).tolist())
        assert long.shape == short.shape and not torch.allclose(long, short)


@pytest.mark.parametrize("kind", list(METHODS), ids=lambda kind: kind.name)
def test_what_a_task_does_not_offer_is_refused_by_name(kind: Any) -> None:
    two_sided = kind.name in ("masked_language_model", "sequence_classification", "question_answering")
    extra = ("task.max_source_len=64",) if kind.name == "sequence_to_sequence" else ()
    model = predictor(kind.name, *(TWO_SIDED if two_sided else extra))
    calls = {
        "generate": ("a",),
        "score": ("a",),
        "classify": ("a",),
        "answer": ("a", "b"),
        "fill_mask": ("<mask>",),
    }
    for name, arguments in {**calls, "write": ("a",)}.items():
        if name not in METHODS[kind]:
            with pytest.raises(ConfigError, match=rf"{name}\(\): task\.kind={kind.name} .*{METHODS[kind][0]}"):
                getattr(model, name)(*arguments)
    assert model.embed("a").ndim == 1
    with pytest.raises(TypeError, match=r"text=3: must be a str"):
        model.embed([3])  # type: ignore[list-item]
