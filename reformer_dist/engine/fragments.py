"""Which part of each parameter, and of its Adam moments, lives on this rank under each ZeRO stage.

A fragment is a run of a flattened parameter: (name, offset, length). Saved by name and offset, any other world
or stage can read the fragments that it needs. This reads ZeRO's internal tables; nothing public gives them
without gathering whole parameters. DeepSpeed's version is pinned for it.

Stage 0: parameters are whole on every rank, and each rank owns an equal run of all of them in a row. Stages 1
and 2: one flat float32 partition for each parameter group. Stage 3: each parameter is cut evenly over the ranks,
and the pieces lie in flat float32 sub-groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class FragmentReader(Protocol):
    """Where saved fragments are read from."""

    adam_step: int

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        """`length` float32 elements of parameter `name` from `offset`; kind is "fp32" or one of MOMENTS."""
        ...


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter, and where its float32 master copy lies."""

    name: str
    offset: int
    length: int
    master: Tensor
    """Flat or parameter-shaped float32 tensor that the optimizer knows as its parameter."""
    start: int
    """Where in `master` the run begins."""
    state: dict[str, Tensor]
    """The optimizer's state of `master`; empty before the first step."""

    def values(self, kind: str) -> Tensor:
        """The run's values [length] as a live view; zeros for moments that do not exist yet."""
        source = self.master.detach() if kind == "fp32" else self.state.get(kind)
        if source is None:
            return torch.zeros(self.length)
        return source.view(-1)[self.start : self.start + self.length]

    @property
    def adam_step(self) -> int:
        return int(self.state["step"]) if "step" in self.state else 0


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shape of each trained parameter by name, also where ZeRO stage 3 has emptied it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}


def engine_fragments(engine: Any, stage: int) -> list[Fragment]:
    """All fragments that this rank owns: over all ranks they cover every parameter exactly once."""
    fragments = list(_local(engine, stage))
    if stage > 0:
        return fragments
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    total = sum(fragment.length for fragment in fragments)
    return list(_cut(fragments, total * rank // world, total * (rank + 1) // world))


def _cut(fragments: list[Fragment], low: int, high: int) -> Iterator[Fragment]:
    """The parts of whole parameters, laid in a row, between two places of the row."""
    place = 0
    for whole in fragments:
        first, last = max(low, place) - place, min(high, place + whole.length) - place
        if first < last:
            yield Fragment(whole.name, first, last - first, whole.master, first, whole.state)
        place += whole.length


def _local(engine: Any, stage: int) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            state = optimizer.state.get(parameter, {})
            yield Fragment(name, 0, parameter.numel(), parameter, 0, state)
        elif stage == 3:
            yield from _stage3_fragment(optimizer, name, parameter)
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            state = optimizer.optimizer.state.get(master, {})
            yield Fragment(name, here.start, here.numel, master, there.start, state)


def _stage3_fragment(optimizer: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    offset = torch.distributed.get_rank() * parameter.ds_tensor.ds_numel
    length = min(length, parameter.ds_numel - offset)  # the last rank's piece may end in padding
    if length > 0:
        master = optimizer.fp32_partitioned_groups_flat[group]
        state = optimizer.optimizer.state.get(master, {})
        yield Fragment(name, offset, length, master, start, state)


@torch.no_grad()
def load_engine_fragments(engine: Any, stage: int, reader: FragmentReader) -> None:
    """Fills master weights, moments and model weights of this rank, and sets Adam's step."""
    fragments = list(_local(engine, stage))
    if reader.adam_step > 0:
        base = engine.optimizer if stage == 0 else engine.optimizer.optimizer
        for master in {id(f.master): f.master for f in fragments}.values():
            base.state[master] = {
                # the fused AdamW counts where the parameters are
                "step": torch.tensor(float(reader.adam_step), device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }
        fragments = list(_local(engine, stage))
    for fragment in fragments:
        kinds = ("fp32", *MOMENTS) if reader.adam_step > 0 else ("fp32",)
        for kind in kinds:
            fragment.values(kind).copy_(reader.read(fragment.name, kind, fragment.offset, fragment.length))
    if stage in (1, 2):
        _fill_whole_weights(engine.module, reader)
    elif stage == 3:
        _fill_partitioned_weights(engine, fragments)


def _fill_whole_weights(model: nn.Module, reader: FragmentReader) -> None:
    """Stages 1 and 2: the model's weights are whole copies beside the master partitions."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = reader.read(name, "fp32", 0, parameter.numel())
            parameter.data.copy_(values.view(parameter.shape))


def _fill_partitioned_weights(engine: Any, fragments: list[Fragment]) -> None:
    """Stage 3: this rank's pieces of the weights; small parameters are then gathered again everywhere."""
    optimizer = engine.optimizer
    optimizer._partition_all_parameters()
    parameters = dict(engine.module.named_parameters())
    for fragment in fragments:
        piece = parameters[fragment.name].ds_tensor
        piece.data.view(-1)[: fragment.length].copy_(fragment.values("fp32"))
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].all_gather(persistent)
