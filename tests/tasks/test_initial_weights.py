"""init_from: every weight is taken over exactly, or named as one that is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_config
from task_data import make
from torch import Tensor, nn

from reformer_dist.checkpoint import RunRecord, write_export
from reformer_dist.data import ByteTokenizer, Corpus, RawSample, write_samples
from reformer_dist.errors import ConfigError, DataError, UserError
from reformer_dist.run import pretrained
from reformer_dist.run.compose import to_dict
from reformer_dist.run.pretrained import load_initial_weights
from reformer_dist.tasks import make_task

KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "language model": ("language_model", ()),
    "completion": ("completion", ()),
    "masked": ("masked_language_model", ()),
    "two classes": ("sequence_classification", ("good", "bad")),
    "two other classes": ("sequence_classification", ("bad", "good")),  # as many, but another meaning
    "three classes": ("sequence_classification", ("a", "b", "c")),
    "answers": ("question_answering", ()),
}
SAME = {frozenset(("language model", "completion"))}


@dataclass
class Source:
    """A model with random weights and its record; a WeightSource."""

    record: RunRecord
    model: nn.Module
    folder: Path = Path()
    step: int = 1
    extra_files: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, kind: str, labels: Sequence[str], seed: int, *changed: str) -> Source:
        is_causal = "true" if kind in ("language_model", "completion") else "false"
        config = tiny_config(Path("d"), Path("o"), f"task.kind={kind}", f"model.causal={is_causal}", *changed)
        model = make_task(config, ByteTokenizer(), labels).build_model()
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=draw)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        return cls(RunRecord(to_dict(config), {"kind": "bytes"}, 257, shapes, list(labels)), model)

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        return self.model.get_parameter(name).detach().flatten()[offset : offset + length]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(pretrained.logger, level, lines.append)
    return lines


@pytest.mark.parametrize(("before", "after"), list(product(KINDS, KINDS)))
def test_every_weight_is_taken_over_or_named(before: str, after: str, tmp_path: Path, logged: list[str]) -> None:
    source, target = Source.of(*KINDS[before], 1), Source.of(*KINDS[after], 2)
    write_export(source, tmp_path / "source")
    initial = {name: parameter.detach().clone() for name, parameter in target.model.named_parameters()}
    load_initial_weights(str(tmp_path / "source"), target.model, target.record)
    told = " ".join(logged).replace(",", " ").split()
    for name, parameter in target.model.named_parameters():
        if name in initial and torch.equal(parameter, initial[name]):
            assert name in told and name.startswith("head."), name
        elif name == "embedding.tokens.weight":  # with or without a row for the mask token
            n_rows = min(len(parameter), len(initial[name]), len(source.model.get_parameter(name)))
            assert torch.equal(parameter[:n_rows], source.model.get_parameter(name)[:n_rows])
            assert (
                len(parameter) == n_rows
                or (parameter[n_rows:] - parameter[:n_rows].mean(dim=0)).abs().max() < 1e-6
            )
            assert (len(parameter) == len(source.model.get_parameter(name))) == (f"{name}:" not in told)
        else:
            assert torch.equal(parameter, source.model.get_parameter(name)), name
    keeps_head = before == after or {before, after} in SAME
    heads = {name for name in source.record.shapes if name.startswith("head.")}
    assert heads.isdisjoint(told) if keeps_head else heads <= set(told)


@pytest.mark.parametrize("kind", ["language model", "two classes"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_another_tie_is_refused(kind: str, tied: str, tmp_path: Path) -> None:
    """In silence, one way lost the trained head, and either way embeddings were scaled wrongly."""
    other = "false" if tied == "true" else "true"
    source = Source.of(*KINDS["language model"], 1, f"model.tie_embeddings={other}")
    target = Source.of(*KINDS[kind], 2, f"model.tie_embeddings={tied}")
    write_export(source, tmp_path / "source")
    with pytest.raises(ConfigError, match=rf"model\.tie_embeddings={tied}: init_from=.*source.* must be {other}"):
        load_initial_weights(str(tmp_path / "source"), target.model, target.record)


@pytest.mark.parametrize(
    "change", ["model.embedding_dim=16", "model.n_layers=1", "model.position=rotary", "model.ff_dim=8"]
)
def test_another_shape_is_refused(change: str, tmp_path: Path) -> None:
    source, target = Source.of(*KINDS["language model"], 1), Source.of(*KINDS["language model"], 2, change)
    write_export(source, tmp_path / "source")
    with pytest.raises(UserError, match="source: is of a different model"):
        load_initial_weights(str(tmp_path / "source"), target.model, target.record)


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    samples = [RawSample(f"{number}", (f"text {number}".encode(),), {"label": "only"}) for number in range(9)]
    write_samples(samples[1:], tmp_path, ByteTokenizer(), heldout=samples[:1], fields=("text",), labels=["only"])
    corpus = Corpus.open([tmp_path])
    task = make("sequence_classification", tmp_path, "model.causal=false", labels=("only",))
    with pytest.raises(DataError, match="'only' is the only label"):
        task.check(corpus)
