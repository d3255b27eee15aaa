"""Gradients and master weights of a step under DeepSpeed, as one rank of a job; writes NAME.pt for each case.

python gradient_cases.py OUT NAME...
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from reformer_dist.config import (
    AttentionKind,
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    Recompute,
    RunConfig,
    TrainerConfig,
)
from reformer_dist.distributed import runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.engine.fragments import parameter_shapes
from reformer_dist.engine.setup import deepspeed_dict, import_deepspeed
from reformer_dist.models import ReformerLM
from reformer_dist.models.block import Block

VOCAB, SEQ_LEN, MICRO, N_MICRO = 64, 128, 16, 8
"""2048 tokens in a micro-batch, of which the commonest token has a fifth; 16384 in a step of all ranks."""
TOKENS = N_MICRO * MICRO * SEQ_LEN


@dataclass(frozen=True)
class Case:
    stage: int
    precision: str = "bf16"
    recompute: str = "reversible"
    offload: bool = False
    shared: bool = False

    @property
    def name(self) -> str:
        flags = [word for word in ("offload", "shared") if getattr(self, word)]
        return "-".join([f"zero{self.stage}", self.precision, self.recompute, *flags])

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def config(self) -> RunConfig:
        model = ModelConfig(
            dim=16,
            n_layers=4 if self.shared else 2,
            n_heads=2,
            layers=[AttentionKind.lsh, AttentionKind.local],
            n_buckets=8,
            window=16,
            local_window=16,
            axial_shape=[16, 16],
            ff_chunk=8,
            tie_embeddings=True,
            share_layers=self.shared,
            recompute=Recompute[self.recompute],
        )
        # buckets and thresholds so small that this model is split into several partitions
        zero = DeepSpeedConfig(
            stage=self.stage,
            offload_optimizer=self.offload,
            param_persistence_threshold=100,
            reduce_bucket_size=2_000,
        )
        trainer = TrainerConfig(micro_batch_size=MICRO, precision=Precision[self.precision])
        data = DataConfig(seq_len=SEQ_LEN, batch_size=N_MICRO * MICRO)
        return RunConfig(model=model, data=data, deepspeed=zero, trainer=trainer, optim=OptimConfig(grad_clip=0.0))

    def model(self) -> ReformerLM:
        return ReformerLM(self.config().model, VOCAB, seed=1)


RECOMPUTES = ("reversible", "checkpoint", "none")
BY_WORLD = {
    1: [Case(1), Case(3, "fp16")],
    2: [
        Case(0, recompute="none", shared=True),
        Case(1, shared=True),
        Case(1, "fp16"),
        Case(1, recompute="none"),
        Case(2, recompute="none"),
        Case(2, "fp16", offload=True),
        Case(3, recompute="none"),
    ],
}
SLOW = [
    *(Case(0, recompute=recompute) for recompute in RECOMPUTES),
    *(Case(*pair, recompute) for pair in product((1, 2, 3), ("bf16", "fp16")) for recompute in RECOMPUTES),
    *(Case(*pair, offload=True) for pair in product((1, 2, 3), ("bf16", "fp16"))),
    *(Case(stage, shared=True, recompute=recompute) for stage in (1, 2) for recompute in RECOMPUTES),
]


def micro_batches(numbers: Iterable[int]) -> Iterator[tuple[Tensor, Tensor, dict[str, int]]]:
    """Inputs, labels and seeds; tokens have the frequencies of words (Zipf)."""
    frequencies = 1.0 / torch.arange(1, VOCAB + 1)
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.multinomial(frequencies, MICRO * (SEQ_LEN + 1), replacement=True, generator=generator)
        tokens = tokens.view(MICRO, SEQ_LEN + 1)
        yield tokens[:, :-1], tokens[:, 1:], {"step": 0, "dropout_seed": number}


class GradientReader:
    """Copies this rank's parts of the gradients when the optimizer takes them."""

    def __init__(self, engine: TrainEngine) -> None:
        self.parts: dict[str, tuple[int, Tensor]] = {}
        self._engine = engine
        optimizer = engine._engine.optimizer
        (optimizer if engine.stage == 0 else optimizer.optimizer).register_step_pre_hook(self._read)

    def _read(self, *_: Any) -> None:
        for fragment in self._engine.fragments():
            if fragment.master.grad is not None:
                grad = fragment.master.grad.detach().view(-1)[fragment.start : fragment.start + fragment.length]
                self.parts[fragment.name] = (fragment.offset, grad.clone())


def gather(parts: dict[str, tuple[int, Tensor]], shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Whole tensors from the parts of all ranks."""
    by_rank: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, parts)
    whole = {name: torch.full(shape, torch.nan).view(-1) for name, shape in shapes.items()}
    for rank_parts in by_rank:
        for name, (offset, values) in rank_parts.items():
            assert values.dtype == torch.float32
            whole[name][offset : offset + len(values)] = values
    return {name: values.view(shapes[name]) for name, values in whole.items()}


@contextmanager
def allow_fp16_on_cpu() -> Iterator[None]:
    """Lifts the refusals of fp16 without a GPU: ours, and DeepSpeed's."""

    def settings(*args: Any) -> dict[str, Any]:
        with mock.patch("torch.cuda.is_available", return_value=True):
            return deepspeed_dict(*args)

    accelerator = import_deepspeed().get_accelerator()
    with (
        mock.patch("reformer_dist.engine.engine.deepspeed_dict", settings),
        mock.patch.object(type(accelerator), "is_fp16_supported", return_value=True),
    ):
        yield


def run(case: Case, rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """The gradients of a step with a learning rate of 0, and the master weights after it."""
    model = case.model()
    shapes = parameter_shapes(model)
    with allow_fp16_on_cpu():
        engine = TrainEngine(model, [Block], case.config(), world_size)
    reader = GradientReader(engine)
    share = N_MICRO // world_size
    for inputs, labels, seeds in micro_batches(range(rank * share, (rank + 1) * share)):
        engine.backward(engine.forward(inputs, labels, **seeds), TOKENS)
    assert not engine.step(lr=0.0).was_skipped
    masters = {f.name: (f.offset, f.values("fp32").clone()) for f in engine.fragments()}
    engine.close()
    return {"gradients": gather(reader.parts, shapes), "weights": gather(masters, shapes)}


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    job = runtime.start()
    cases = {case.name: case for cases in (*BY_WORLD.values(), SLOW) for case in cases}
    # stage 3 last: from its first engine on, DeepSpeed replaces torch's linear in the whole process
    for case in sorted((cases[name] for name in names), key=lambda case: case.stage):
        found = run(case, job.rank, job.world_size)
        if job.is_main:
            torch.save(found, out / f"{case.name}.pt")
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
