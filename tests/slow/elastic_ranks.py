"""Trains in many layouts, and in each goes on with the checkpoints of all, as one rank of a job.

elastic_ranks.py write DATA ROOT     each layout of as many ranks trains and saves in ROOT/LAYOUT
elastic_ranks.py read DATA ROOT      and goes on with the checkpoint of each layout, in ROOT/LAYOUT-after-LAYOUT

ROOT/LAYOUT/held.safetensors is what DeepSpeed itself said that it held when the checkpoint was made;
ROOT/found-N.json tells of the readers on N ranks what was otherwise when they had read it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file
from support.tiny import tiny_config
from torch import Tensor

from reformer_dist.checkpoint import Fragment
from reformer_dist.checkpoint.files import step_folder
from reformer_dist.checkpoint.fragment import KINDS
from reformer_dist.config import RunConfig
from reformer_dist.distributed import runtime
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.run import build

SAVED, LAST = 3, 8
# Adam's usual eps makes whole steps out of the rounding of gradients that are nearly 0
SETTINGS = ("optim.eps=1e-5", "optim.schedule=constant", "trainer.micro_batch_size=null")
SETTINGS += (f"trainer.max_steps={LAST}", "trainer.keep_checkpoints=0", "model.n_layers=1")


@dataclass(frozen=True)
class Layout:
    """How a job of `ranks` processes lays out a run."""

    ranks: int
    stage: int
    sequence: int
    offloads: bool = False

    def __str__(self) -> str:
        return f"{self.ranks}-ranks-zero{self.stage}-sequence{self.sequence}{'-offload' * self.offloads}"

    def config(self, data: Path, output: Path, *changed: str) -> RunConfig:
        zero = (f"deepspeed.stage={self.stage}", f"deepspeed.offload_optimizer={self.offloads}")
        # one sequence by heads, one by buckets
        sharing = (f"parallel.sequence={self.sequence}", f"parallel.heads={1 if self.ranks == 4 else 'null'}")
        return tiny_config(data, output, *SETTINGS, *zero, *sharing, *changed)


LAYOUTS = [
    *(Layout(ranks, stage, 1) for ranks in (1, 2, 4) for stage in range(4)),
    *(Layout(ranks, stage, 2) for ranks in (2, 4) for stage in range(4)),
    *(Layout(2, 2, 1, offloads=True), Layout(4, 3, 2, offloads=True)),
]


class Engine(TrainEngine):
    """Filled by one checkpoint after another, since making it takes longer than all else."""

    held: dict[str, Tensor]
    """Weights and moments when fragments were asked for the first time, by "<parameter>|<kind>"."""

    def fragments(self) -> list[Fragment]:
        if not hasattr(self, "held"):
            self.held = dict(self.whole())
        return super().fragments()

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Flat weights and moments by DeepSpeed's public functions, which know nothing of our fragments."""
        if self.stage in (1, 2):
            # by itself, DeepSpeed links the states of the first parameter group alone
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.module.named_parameters():
            for kind in KINDS:
                if self.stage == 0:
                    found = parameter if kind == "fp32" else self._engine.optimizer.state[parameter][kind]
                elif kind == "fp32":
                    found = safe_get_full_fp32_param(parameter)
                else:
                    found = safe_get_full_optimizer_state(parameter, kind)
                yield f"{name}|{kind}", found.detach().flatten().clone()

    def otherwise(self, held: dict[str, Tensor]) -> list[str]:
        """What this rank has that is not what a checkpoint was made of."""
        found = dict(self.whole())
        assert found.keys() == held.keys()
        differing = [name for name in held if not torch.equal(found[name], held[name])]
        parameters = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            for name, parameter in self.module.named_parameters():
                if not torch.equal(parameter.detach().flatten(), held[f"{name}|fp32"]):
                    differing.append(f"{name} of the model")
        return differing

    def close(self) -> None:
        pass

    def end(self) -> None:
        super().close()


def write(job: Runtime, layout: Layout, data: Path, root: Path) -> None:
    """Trains without interruption; its checkpoint of the step SAVED is what others go on with."""
    run = root / str(layout)
    with ExitStack() as resources, patch.object(build, "TrainEngine", Engine):
        trainer = build.build_trainer(layout.config(data, run, f"trainer.save_every={SAVED}"), job, resources)
        trainer.fit()
        if job.is_main:
            save_file(trainer._engine.held, run / "held.safetensors")  # type: ignore[attr-defined]
        trainer._engine.end()  # type: ignore[attr-defined]


def read(job: Runtime, layout: Layout, data: Path, root: Path) -> dict[str, list[str]]:
    """What was otherwise after each reading, on any rank."""
    engines: list[Engine] = []

    def made_once(*args: object) -> Engine:
        engines.extend([] if engines else [Engine(*args)])  # type: ignore[arg-type]
        return engines[0]

    found = {}
    every = layout.config(data, root, "trainer.save_every=0")
    for source in LAYOUTS:
        name = f"{layout}-after-{source}"
        start = step_folder(root / str(source) / "checkpoints", SAVED)
        config = replace(every, output_dir=str(root / name), resume=str(start))
        with ExitStack() as resources, patch.object(build, "TrainEngine", made_once):
            trainer = build.build_trainer(config, job, resources)
            held = load_file(root / str(source) / "held.safetensors")
            found[name] = [words for of_rank in job.gather(engines[0].otherwise(held)) for words in of_rank]
            trainer.fit()
    engines[0].end()
    return found


def main(what: str, data: Path, root: Path) -> None:
    torch.set_num_threads(1)
    job = runtime.start()
    found: dict[str, list[str]] = {}
    # stage 3 last: from its first engine on, DeepSpeed replaces torch's linear in the whole process
    for layout in sorted((each for each in LAYOUTS if each.ranks == job.world_size), key=lambda each: each.stage):
        if what == "write":
            write(job, layout, data, root)
        else:
            found |= read(job, layout, data, root)
    if job.is_main and what == "read":
        (root / f"found-{job.world_size}.json").write_text(json.dumps(found))
    runtime.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
