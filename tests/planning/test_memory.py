"""The formulas against what a real model and a real engine hold, counted tensor by tensor."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from support.live_memory import LiveMemory
from support.tiny import tiny_config

from reformer_dist.build import build_trainer
from reformer_dist.config import AttentionKind, ModelConfig, Recompute
from reformer_dist.models import ReformerLM
from reformer_dist.planning.memory import STORED, MemoryPlan
from reformer_dist.planning.parameters import count_parameters
from reformer_dist.planning.sizes import Job
from reformer_dist.planning.states import OPTIMIZER, States

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
QUIET = ("trainer.save_every=0", "trainer.max_steps=2", "resume=never")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"share_layers": True, "n_layers": 4},
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
    count = count_parameters(model, VOCAB)
    assert count.total == sum(p.numel() for p in ReformerLM(model, VOCAB).parameters())
    assert count.total == sum(map(sum, count.groups))
    assert count.total == count.embedding + count.above + sum(block.total for block in count.blocks)


@pytest.mark.parametrize("recompute", list(Recompute), ids=lambda recompute: recompute.value)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"layers": ["exact"]},
        {"dropout": 0.1, "ff_dropout": 0.1},
        {"norm": "scale", "one_value_head": True},
        {"norm": "rezero"},
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["gelu", "relu", "glu"])
def test_what_autograd_holds_of_a_layer(recompute, changed, activation, tiny_data, tmp_path):
    """Held between forward and backward, of three layers more."""
    changed = changed | {"activation": activation, "recompute": recompute.value}
    words = [f"model.{key}={str(value).replace(' ', '')}".replace("'", "") for key, value in changed.items()]

    def measure(n_layers: int) -> tuple[int, float]:
        config = tiny_config(
            tiny_data, tmp_path, *LONG, *words, f"model.n_layers={n_layers}", "model.n_buckets=16"
        )
        plan = MemoryPlan(Job(config, 1, 1, VOCAB, "cpu"), count_parameters(config.model, VOCAB))
        loss_moment = next(moment for moment in plan.moments() if moment.name == "loss")
        model, tokens = ReformerLM(config.model, VOCAB), torch.zeros(2, 2048, dtype=torch.int64)
        with LiveMemory() as live:
            loss = model(tokens, tokens, step=0, dropout_seed=1)
            held = live.now
        del loss
        return held, loss_moment.parts.get(STORED, 0.0)

    (few, planned_few), (many, planned_many) = measure(1), measure(4)
    assert many - few == pytest.approx(planned_many - planned_few, rel=0.01, abs=2e4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_optimizer_bytes_are_those_of_the_real_engine(stage, tiny_data, tmp_path, job):
    config = tiny_config(tiny_data, tmp_path / "run", *QUIET, f"deepspeed.stage={stage}")
    with ExitStack() as resources:
        trainer = build_trainer(config, job, resources)
        trainer.fit()
        fragments = trainer._engine.fragments()
        masters = {id(fragment.master): fragment for fragment in fragments}.values()
        moments = sum(f.state[name].nbytes for f in masters for name in ("exp_avg", "exp_avg_sq"))
        held = moments + (sum(f.master.nbytes for f in masters) if stage else 0)
    states = States(Job(config, 1, 1, VOCAB, "cpu"), count_parameters(config.model, VOCAB))
    assert states.held()[OPTIMIZER] == held


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("model.layers=[exact]",),
        ("model.recompute=none",),
        ("model.recompute=checkpoint", "model.n_layers=4"),
        ("trainer.precision=bf16", "model.position=rotary"),
        ("deepspeed.stage=2", "model.n_layers=6", "data.batch_size=1", "trainer.save_every=1"),
    ],
    ids=str,
)
def test_peak_of_a_step_is_foretold(words, tiny_data, tmp_path, job):
    config = tiny_config(tiny_data, tmp_path / "run", *QUIET, *WIDE, "model.dropout=0", *words)
    count = count_parameters(config.model, VOCAB)
    config.deepspeed.reduce_bucket_size = count.total + 4096  # which is counted whole here
    with ExitStack() as resources, LiveMemory() as live:
        build_trainer(config, job, resources).fit()
    planned = MemoryPlan(Job(config, 1, 1, VOCAB, "cpu"), count).peak()
    assert planned.total == pytest.approx(live.peak, rel=0.1)


def test_reversible_memory_does_not_grow_with_depth_and_a_stored_one_does():
    def stored(recompute: Recompute, n_layers: int) -> float:
        from reformer_dist.config import DataConfig, RunConfig

        model = ModelConfig(n_layers=n_layers, layers=[AttentionKind.local], recompute=recompute)
        config = RunConfig(model=model, data=DataConfig(batch_size=1))
        return MemoryPlan(Job(config, 1, 1, VOCAB, "cpu"), count_parameters(model, VOCAB))._stored(n_layers)

    assert stored(Recompute.reversible, 16) == stored(Recompute.reversible, 4) == 0
    assert stored(Recompute.none, 16) == 4 * stored(Recompute.none, 4)
