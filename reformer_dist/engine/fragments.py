"""Maps the parts of parameters and Adam moments that ZeRO keeps on this rank to checkpoint fragments.

Fragments are saved by parameter name and offset, so that any other world size or stage can read the ranges it
needs. The mapping reads ZeRO's internal tables, since no public API exposes them without gathering whole
parameters; DeepSpeed's version is pinned for this reason.

Stage 0: parameters are whole on every rank, and each rank owns an equal range of their concatenation. Stages 1
and 2: one flat float32 partition per parameter group. Stage 3: each parameter is split evenly over the ranks,
and the parts are stored in flat float32 sub-groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reformer_dist.checkpoint import CheckpointReader, Fragment
from reformer_dist.checkpoint.fragment import KINDS, MOMENTS


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Full shape of each trained parameter by name, also after ZeRO stage 3 has partitioned it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}


def engine_fragments(engine: Any, stage: int) -> list[Fragment]:
    """All fragments that this rank owns; over all ranks they cover every parameter exactly once."""
    fragments = list(_local_fragments(engine, stage))
    if stage > 0:
        return fragments
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    total = sum(fragment.length for fragment in fragments)
    return list(_slice(fragments, total * rank // world, total * (rank + 1) // world))


def _slice(fragments: list[Fragment], low: int, high: int) -> Iterator[Fragment]:
    """The range [low, high) of the concatenation of whole parameters."""
    start = 0
    for whole in fragments:
        first, last = max(low, start) - start, min(high, start + whole.length) - start
        if first < last:
            yield Fragment(whole.name, first, last - first, whole.master, first, whole.state)
        start += whole.length


def _local_fragments(engine: Any, stage: int) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            state = optimizer.state.get(parameter, {})
            yield Fragment(name, 0, parameter.numel(), parameter, 0, state)
        elif stage == 3:
            group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset = torch.distributed.get_rank() * parameter.ds_tensor.ds_numel
            length = min(length, parameter.ds_numel - offset)  # the last rank's part may end in padding
            if length > 0:
                master = optimizer.fp32_partitioned_groups_flat[group]
                state = optimizer.optimizer.state.get(master, {})
                yield Fragment(name, offset, length, master, start, state)
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            in_parameter, in_master = mapping.lp_fragment_address, mapping.hp_fragment_address
            state = optimizer.optimizer.state.get(master, {})
            yield Fragment(name, in_parameter.start, in_parameter.numel, master, in_master.start, state)


@torch.no_grad()
def set_master_weights(engine: Any, stage: int, weights: dict[str, Tensor]) -> None:
    """Fills this rank's master weights from whole parameters by name. The model's weights keep their values."""
    for fragment in _local_fragments(engine, stage):
        whole = weights[fragment.name].view(-1)
        fragment.values("fp32").copy_(whole[fragment.offset : fragment.offset + fragment.length])


@torch.no_grad()
def load_engine_fragments(engine: Any, stage: int, reader: CheckpointReader) -> None:
    """Fills this rank's master weights, moments and model weights, and sets Adam's step."""
    fragments = list(_local_fragments(engine, stage))
    if reader.adam_step > 0:
        base = engine.optimizer if stage == 0 else engine.optimizer.optimizer
        for master in {id(f.master): f.master for f in fragments}.values():
            base.state[master] = {
                # fused AdamW keeps its step count on the parameters' device
                "step": torch.tensor(float(reader.adam_step), device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }
        fragments = list(_local_fragments(engine, stage))
    for fragment in fragments:
        for kind in KINDS if reader.adam_step > 0 else ("fp32",):
            fragment.values(kind).copy_(reader.read(fragment.name, kind, fragment.offset, fragment.length))
    if stage in (1, 2):
        # every rank has the complete model weights besides its partition of the master weights
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                values = reader.read(name, "fp32", 0, parameter.numel())
                parameter.data.copy_(values.view(parameter.shape))
    elif stage == 3:
        _load_stage3_weights(engine, fragments)


def _load_stage3_weights(engine: Any, fragments: list[Fragment]) -> None:
    """Fills this rank's partitions of the model weights, then regathers small, persistent parameters."""
    optimizer = engine.optimizer
    optimizer._partition_all_parameters()
    parameters = dict(engine.module.named_parameters())
    for fragment in fragments:
        partition = parameters[fragment.name].ds_tensor
        partition.data.view(-1)[: fragment.length].copy_(fragment.values("fp32"))
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].all_gather(persistent)
