"""The memory formulas against a real model and engine, counted tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from support.live_memory import LiveMemory
from support.tiny import tiny_config
from torch import nn

from reformer_dist.config import AttentionKind, ModelConfig, Recompute
from reformer_dist.data import ByteTokenizer
from reformer_dist.models import ReformerLM
from reformer_dist.planning.memory import STORED, StepMemory
from reformer_dist.planning.sizes import JobSpec
from reformer_dist.planning.states import AVERAGE, OPTIMIZER, ModelStateMemory, ParameterCount, count_parameters
from reformer_dist.run.build import build_trainer
from reformer_dist.tasks import Task, make_task

VOCAB = 257  # of the bytes
LONG = ("data.seq_len=2048", "data.batch_size=2", "trainer.micro_batch_size=null", "model.axial_shape=[32,64]")
WIDE = (
    *LONG,
    "model.dim=128",
    "model.n_buckets=32",
    "model.window=32",
    "model.local_window=64",
    "model.dropout=0",
)
# more parameters than activations
LARGE = ("model.dim=512", "model.n_layers=4", "data.seq_len=128", "model.axial_shape=[8,16]", "model.n_buckets=4")
# task kinds whose model is not ReformerLM, and the overrides that they need
OTHER_KINDS = {
    "sequence_classification": ("model.causal=false",),
    "question_answering": ("model.causal=false",),
    "sequence_to_sequence": ("task.max_source_len=64", "model.n_encoder_layers=3"),
}
SHORT = "data.seq_len=32"
QUIET = ("trainer.save_every=0", "trainer.max_steps=2", "resume=never")


def count_of(model: ModelConfig) -> ParameterCount:
    return count_parameters(partial(ReformerLM, model, VOCAB))


def other_task(kind: str, data: Path, output: Path, *words: str) -> Task:
    config = tiny_config(data, output, f"task.kind={kind}", *OTHER_KINDS[kind], *words)
    return make_task(config, ByteTokenizer(), ["red", "green", "blue"])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"share_layers": True, "n_layers": 4},
        {"share_layers": True, "n_layers": 5, "compat.norm_per_layer": True},
        {"tie_embeddings": True, "activation": "glu", "head_dim": 24},
        {"position": "learned", "layers": ["exact"], "ff_mult": 2},
        {"norm": "scale", "embedding_dim": 12, "one_value_head": True},
        {"norm": "rezero", "embedding_dim": 12, "tie_embeddings": True, "layer_drop": 0.2},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_real_model(changed, tiny_data, tmp_path):
    words = [f"model.{key}={str(value).replace(' ', '')}" for key, value in changed.items()]
    model = tiny_config(tiny_data, tmp_path, *words).model
    check_count(lambda: ReformerLM(model, VOCAB))


def check_count(build_model: Callable[[], nn.Module]) -> ParameterCount:
    count = count_parameters(build_model)
    assert count.total == sum(p.numel() for p in build_model().parameters())
    assert count.total == count.trained == sum(sum(group.sizes) for group in count.groups)
    blocks = sum(block.total for block in [*count.blocks, *count.encoder_blocks])
    assert count.total == count.embedding + count.above + count.above_encoder + blocks
    return count


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_parameters_of_other_models(kind, tiny_data, tmp_path):
    count = check_count(other_task(kind, tiny_data, tmp_path).build_model)
    assert len(count.encoder_blocks) == (3 if kind == "sequence_to_sequence" else 0)
    assert all(bool(block.cross_attention) == bool(count.encoder_blocks) for block in count.blocks)


@pytest.mark.parametrize("recompute", list(Recompute), ids=lambda recompute: recompute.value)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"layers": ["exact"]},
        {"dropout": 0.1, "ff_dropout": 0.1},
        {"norm": "scale", "one_value_head": True},
        {"norm": "rezero"},
        {"norm": "rms"},
        {"shared_qk": False, "layers": ["lsh"]},
        {"qk_conv": 3, "layers": ["lsh"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["gelu", "relu", "glu", "swiglu"])
def test_activations_of_a_layer(recompute, changed, activation, tiny_data, tmp_path):
    """Tensors held between forward and backward by three additional layers."""
    changed = changed | {"activation": activation, "recompute": recompute.value}
    words = [f"model.{key}={str(value).replace(' ', '')}".replace("'", "") for key, value in changed.items()]

    def measure(n_layers: int) -> tuple[int, float]:
        config = tiny_config(
            tiny_data, tmp_path, *LONG, *words, f"model.n_layers={n_layers}", "model.n_buckets=16"
        )
        plan = StepMemory(JobSpec(config, 1, 1, VOCAB, "cpu"), count_of(config.model))
        loss_snapshot = next(snapshot for snapshot in plan.snapshots() if snapshot.name == "loss")
        model, tokens = ReformerLM(config.model, VOCAB), torch.zeros(2, 2048, dtype=torch.int64)
        with LiveMemory() as live:
            loss = model(tokens, tokens, step=0, dropout_seed=1)
            held = live.now
        del loss
        return held, loss_snapshot.parts.get(STORED, 0.0)

    (few, planned_few), (many, planned_many) = measure(1), measure(4)
    assert many - few == pytest.approx(planned_many - planned_few, rel=0.01, abs=2e4)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (0, ()),
        (1, ()),
        (2, ("optim.average=window",)),
        (0, ("optim.kind=adafactor", "optim.average=exponential")),
        (2, ("optim.kind=muon", "optim.groups=[{match: stack.blocks.0.*, frozen: true}]")),
    ],
    ids=str,
)
def test_optimizer_bytes_are_those_of_the_real_engine(stage, words, tiny_data, tmp_path, job):
    config = tiny_config(tiny_data, tmp_path / "run", *QUIET, f"deepspeed.stage={stage}", *words)
    with ExitStack() as resources:
        trainer = build_trainer(config, job, resources)
        trainer.fit()
        fragments = [each for each in trainer._engine.fragments() if each.state]
        masters = {id(fragment.master): fragment for fragment in fragments}.values()
        states = {kind: 0 for fragment in masters for kind in fragment.state if kind != "step"}
        for fragment in masters:
            for kind in states:
                states[kind] += fragment.state[kind].nbytes if kind in fragment.state else 0
        factors = sum(values.nbytes for fragment in fragments for values in fragment.factors.values())
        averages = sum(states[kind] for kind in states if "average" in kind)
        moments = sum(states.values()) - averages + factors
        held = moments + (sum(f.master.nbytes for f in masters) if stage else 0)
    count = count_parameters(partial(ReformerLM, config.model, VOCAB), config.optim)
    planned = ModelStateMemory(JobSpec(config, 1, 1, VOCAB, "cpu"), count).held()
    assert planned[OPTIMIZER] == held
    assert planned.get(AVERAGE, 0.0) == averages
    assert count.frozen == sum(p.numel() for p in trainer._engine.module.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("model.layers=[exact]",),
        ("model.recompute=none",),
        ("model.recompute=checkpoint", "model.n_layers=4"),
        ("trainer.precision=bf16", "model.position=rotary"),
        ("model.attention_backend=torch", "model.recompute=none"),
        ("model.layers=[lsh]", "model.shared_qk=false", "trainer.precision=bf16"),
        ("model.layers=[lsh]", "model.shared_qk=false", "model.attention_backend=torch"),
        ("model.layers=[lsh]", "model.qk_conv=4", "model.shared_qk=false", "trainer.precision=bf16"),
        ("model.attention_backend=torch", "trainer.precision=bf16", "model.position=rotary"),
        ("data.mask_documents=true", "data.reset_position_ids=true"),
        ("data.mask_documents=true", "model.attention_backend=torch", "model.position=rotary"),
        ("data.mask_documents=true", "model.layers=[exact]"),
        ("deepspeed.stage=2", "model.n_layers=6", "data.batch_size=1", "trainer.save_every=1"),
        *(
            (f"deepspeed.stage={stage}", "trainer.precision=bf16", "trainer.micro_batch_size=1", *LARGE)
            for stage in (1, 2)
        ),
        ("optim.kind=muon", "deepspeed.stage=1", "trainer.precision=bf16", "optim.average=exponential", *LARGE),
        ("optim.kind=adafactor", "deepspeed.stage=2", "trainer.precision=bf16", *LARGE),
        ("optim.groups=[{match: 'stack.blocks.[012].*', frozen: true}]", "deepspeed.stage=1", *LARGE),
    ],
    ids=str,
)
def test_peak_of_a_step_is_predicted(words, tiny_data, tmp_path, job):
    config = tiny_config(tiny_data, tmp_path / "run", *QUIET, *WIDE, "model.dropout=0", *words)
    count = count_parameters(partial(ReformerLM, config.model, VOCAB), config.optim)
    config.deepspeed.reduce_bucket_size = count.trained + 4096  # the bucket is counted in full here
    with ExitStack() as resources, LiveMemory(tells_where=True) as live:
        build_trainer(config, job, resources).fit()
    planned = StepMemory(JobSpec(config, 1, 1, VOCAB, "cpu"), count).peak()
    assert planned.total == pytest.approx(live.peak, rel=0.1), live.owners()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sequence_classification", ()),
        ("sequence_classification", ("model.layers=[exact]",)),
        ("question_answering", ()),
        ("sequence_to_sequence", ()),
        ("sequence_to_sequence", ("task.max_source_len=2048", "model.layers=[exact]")),
        ("sequence_to_sequence", ("task.max_source_len=2048", "model.cross_attention=lsh")),
        ("sequence_to_sequence", ("task.max_source_len=2048", "model.attention_dropout=0.1")),
        ("sequence_to_sequence", ("model.recompute=none",)),
        ("sequence_to_sequence", ("model.recompute=checkpoint",)),
        ("sequence_to_sequence", ("task.max_source_len=2048", "data.seq_len=64")),
    ],
    ids=str,
)
def test_peak_of_other_models_is_predicted(kind, words, tiny_data, tmp_path):
    """Weights, activations and gradients, with rows that are full except for a few tokens."""
    task = other_task(kind, tiny_data, tmp_path, *WIDE, "task.max_source_len=512", *QUIET, *words)
    with LiveMemory() as live:
        model, rows = task.build_model(), full_rows(task)
        model(**rows, step=0, dropout_seed=1).backward()
    snapshots = StepMemory(
        JobSpec(task.config, 1, 1, VOCAB, "cpu"), count_parameters(task.build_model)
    ).snapshots()
    planned = max(snapshot.total - snapshot.parts[OPTIMIZER] for snapshot in snapshots)
    assert planned == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize(
    "words",
    [(), ("model.cross_attention=lsh",), ("model.attention_dropout=0.1",), ("model.cross_attention=lsh", SHORT)],
    ids=str,
)
def test_activations_of_a_decoder_layer(words, tiny_data, tmp_path):
    """Tensors held by three additional layers; short sequences hold dense (query, key) matrices."""

    def measure(n_layers: int) -> tuple[int, float]:
        changed = ("model.recompute=none", "task.max_source_len=512", *words, f"model.n_layers={n_layers}")
        task = other_task("sequence_to_sequence", tiny_data, tmp_path, *WIDE, *changed)
        job = JobSpec(task.config, 1, 1, VOCAB, "cpu")
        snapshots = StepMemory(job, count_parameters(task.build_model)).snapshots()
        planned = next(snapshot for snapshot in snapshots if snapshot.name == "loss").parts[STORED]
        model, rows = task.build_model(), full_rows(task)
        with LiveMemory() as live:
            loss = model(**rows, step=0, dropout_seed=1)
            held = live.now
        del loss
        return held, planned

    (few, planned_few), (many, planned_many) = measure(1), measure(4)
    assert many - few == pytest.approx(planned_many - planned_few, rel=0.02)


def full_rows(task: Task) -> dict[str, torch.Tensor]:
    """One micro-batch of a task, as keyword arguments of its model."""
    draw = torch.Generator().manual_seed(0)
    n_rows, kind = task.config.data.batch_size, task.config.task.kind.name

    def text(seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (torch.arange(seq_len) < seq_len - 3).expand(n_rows, -1)
        return torch.randint(0, VOCAB, (n_rows, seq_len), generator=draw), mask

    tokens, mask = text(task.config.data.seq_len)
    rows = {"tokens": tokens, "key_padding_mask": mask}
    if kind == "sequence_to_sequence":
        source, source_mask = text(task.config.task.max_source_len)
        return rows | {"source": source, "source_mask": source_mask, "labels": tokens}
    if kind == "question_answering":
        return rows | {"labels": tokens[:, :2], "answer_mask": mask}
    return rows | {"labels": torch.zeros(n_rows, dtype=torch.int64)}


def test_reversible_memory_does_not_grow_with_depth_and_a_stored_one_does():
    def stored(recompute: Recompute, n_layers: int) -> float:
        from reformer_dist.config import DataConfig, RunConfig

        model = ModelConfig(n_layers=n_layers, layers=[AttentionKind.local], recompute=recompute)
        config = RunConfig(model=model, data=DataConfig(batch_size=1))
        return StepMemory(JobSpec(config, 1, 1, VOCAB, "cpu"), count_of(model)).decoder.stored(n_layers)

    assert stored(Recompute.reversible, 16) == stored(Recompute.reversible, 4) == 0
    assert stored(Recompute.none, 16) == 4 * stored(Recompute.none, 4)
