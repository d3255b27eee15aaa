"""Maps the parts of parameters and optimizer states that ZeRO keeps on this rank to checkpoint fragments.

Fragments are saved by parameter name and offset, so that any other world size or stage can read the ranges it
needs. The mapping reads ZeRO's internal tables, since no public API exposes them without gathering whole
parameters; DeepSpeed's version is pinned for this reason.

Stage 0: parameters are whole on every rank, and each rank owns an equal range of their concatenation. Stages 1
and 2: one flat float32 partition per parameter group. Stage 3: each parameter is split evenly over the ranks,
and the parts are stored in flat float32 sub-groups. Frozen parameters have no partition: each rank owns a range of
their concatenation, as at stage 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reformer_dist.checkpoint import CheckpointReader, Fragment
from reformer_dist.engine.average import WeightAverage
from reformer_dist.engine.groups import Group
from reformer_dist.engine.matrix_layout import partitioned_pieces, whole_pieces
from reformer_dist.engine.matrix_optimizer import FACTORS, MatrixOptimizer
from reformer_dist.errors import CheckpointError

WEIGHTS_ONLY = ("fp32",)


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Full shape of each parameter by name, also after ZeRO stage 3 has partitioned it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


class ModelShards:
    """The weights and optimizer states on this rank."""

    def __init__(self, engine: Any, stage: int, groups: Iterable[Group], frozen: Mapping[str, Tensor]) -> None:
        """frozen: whole float32 weights on the host of the parameters that are not trained."""
        self._engine, self._stage = engine, stage
        self._moments = {name: group.update.moments for group in groups for name in group.parameters}
        self._shapes = parameter_shapes(engine.module)
        self._frozen = [
            Fragment(each.name, each.offset, each.length, each.values("fp32").clone(), 0, {}, WEIGHTS_ONLY)
            for each in _slice_evenly([_whole(name, weight) for name, weight in frozen.items()])
        ]
        self.average: WeightAverage | None = None
        base = self._optimizer
        self._matrices = base if isinstance(base, MatrixOptimizer) else None
        if self._matrices is not None:
            self._attach(self._matrices)

    @property
    def _optimizer(self) -> Any:
        """The optimizer that was handed to DeepSpeed."""
        return self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer

    def _attach(self, optimizer: MatrixOptimizer) -> None:
        fragments = list(self._local())
        if self._stage == 0:
            optimizer.attach(whole_pieces(fragments, self._shapes), is_split=False)
        else:
            is_split = torch.distributed.get_world_size() > 1
            optimizer.attach(partitioned_pieces(fragments, self.masters, self._shapes), is_split=is_split)

    @property
    def masters(self) -> list[Tensor]:
        """The float32 tensors that the optimizer updates, in the same order on every rank."""
        if self._stage == 0:
            return [p for p in self._engine.module.parameters() if p.requires_grad]
        zero = self._engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        return list(flat)

    def owned(self) -> list[Fragment]:
        """All fragments that this rank owns; over all ranks they cover every parameter exactly once."""
        fragments = list(self._local())
        return [*(_slice_evenly(fragments) if self._stage == 0 else fragments), *self._frozen]

    def _fragment(self, name: str, offset: int, length: int, master: Tensor, start: int) -> Fragment:
        averages = {} if self.average is None else self.average.tensors[master]
        state = {**self._optimizer.state.get(master, {}), **averages}
        kinds = ("fp32", *self._moments[name], *averages)
        factors = {}
        if self._matrices is not None and offset == 0:
            factors = self._matrices.factors.get(name, {})
        return Fragment(name, offset, length, master, start, state, kinds, factors)

    def _local(self) -> Iterator[Fragment]:
        """The trained parameters on this rank, at stage 0 whole."""
        optimizer = self._engine.optimizer
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._stage == 0:
                yield self._fragment(name, 0, parameter.numel(), parameter, 0)
            elif self._stage == 3:
                group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                offset = torch.distributed.get_rank() * parameter.ds_tensor.ds_numel
                length = min(length, parameter.ds_numel - offset)  # the last rank's part may end in padding
                if length > 0:
                    yield self._fragment(
                        name, offset, length, optimizer.fp32_partitioned_groups_flat[group], start
                    )
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                in_parameter, in_master = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield self._fragment(name, in_parameter.start, in_parameter.numel, master, in_master.start)

    @torch.no_grad()
    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Fills this rank's master weights from whole parameters by name, and leaves the model's weights alone."""
        for fragment in self._local():
            whole = weights[fragment.name].view(-1)
            fragment.values("fp32").copy_(whole[fragment.offset : fragment.offset + fragment.length])

    @torch.no_grad()
    def load(self, reader: CheckpointReader) -> None:
        """Fills this rank's master weights, optimizer states, averages and model weights.

        Raises CheckpointError if the checkpoint lacks the state of a trained parameter.
        """
        self.load_moments(reader)
        for fragment in (*self._local(), *self._frozen):
            fragment.values("fp32").copy_(reader.read(fragment.name, "fp32", fragment.offset, fragment.length))
        if self.average is not None:
            self._load_average(self.average, reader)
        if self._stage == 3:
            for name, parameter in self._untrained():
                partition = parameter.ds_tensor
                offset = torch.distributed.get_rank() * partition.ds_numel
                length = min(partition.ds_numel, parameter.ds_numel - offset)
                if length > 0:
                    partition.data.view(-1)[:length].copy_(reader.read(name, "fp32", offset, length))
            self._gather_stage3_weights()
            return
        # every rank has the complete model weights, at stages 1 and 2 besides its partition of the master weights
        for name, parameter in self._engine.module.named_parameters() if self._stage else self._untrained():
            parameter.data.copy_(reader.read(name, "fp32", 0, parameter.numel()).view(parameter.shape))

    def _untrained(self) -> Iterator[tuple[str, Any]]:
        return ((name, p) for name, p in self._engine.module.named_parameters() if not p.requires_grad)

    @torch.no_grad()
    def load_moments(self, reader: CheckpointReader) -> None:
        """Fills this rank's optimizer states, and sets their step. Raises CheckpointError if any is missing."""
        for name, moments in self._moments.items():
            if missing := [moment for moment in moments if moment not in reader.kinds(name)]:
                fix = "it was frozen or trained by another optimizer; begin another run, with init_from"
                raise CheckpointError(f"{reader.folder}: holds no {missing[0]} of {name}: {fix}")
        if reader.adam_step == 0:
            return
        for fragment in self._local():
            state = self._optimizer.state[fragment.master]
            # fused AdamW keeps its step count on the parameters' device
            state["step"] = torch.tensor(float(reader.adam_step), device=fragment.master.device)
            for moment in self._moments[fragment.name]:
                state.setdefault(moment, torch.zeros_like(fragment.master))
        for fragment in self._local():
            for moment in self._moments[fragment.name]:
                values = reader.read(fragment.name, moment, fragment.offset, fragment.length)
                fragment.values(moment).copy_(values)
        if self._matrices is not None:
            self._load_factors(self._matrices, reader)

    def _load_factors(self, optimizer: MatrixOptimizer, reader: CheckpointReader) -> None:
        device = self.masters[0].device
        for name, moments in self._moments.items():
            if not moments:
                optimizer.factors[name] = {kind: reader.read_factor(name, kind).to(device) for kind in FACTORS}

    def _load_average(self, average: WeightAverage, reader: CheckpointReader) -> None:
        """Takes over an average of the same kind; any other begins again with the weights."""
        saved = reader.average
        if saved is None or saved.window != average.record.window:
            average.restart()
            return
        for fragment in self._local():
            for kind in average.record.kinds:
                fragment.values(kind).copy_(reader.read(fragment.name, kind, fragment.offset, fragment.length))
        average.restart(saved.updates)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Fills the model's trained weights from the master weights of all ranks, as after a step."""
        if self._stage == 3:
            self._gather_stage3_weights()
        elif self._stage > 0:
            self._engine.optimizer.update_lp_params()

    def _gather_stage3_weights(self) -> None:
        """Fills this rank's partitions of the model weights, then regathers small, persistent parameters."""
        optimizer = self._engine.optimizer
        optimizer._partition_all_parameters()
        parameters = dict(self._engine.module.named_parameters())
        for fragment in self._local():
            partition = parameters[fragment.name].ds_tensor
            partition.data.view(-1)[: fragment.length].copy_(fragment.values("fp32"))
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)


def _whole(name: str, weight: Tensor) -> Fragment:
    return Fragment(name, 0, weight.numel(), weight, 0, {}, WEIGHTS_ONLY)


def _slice_evenly(fragments: list[Fragment]) -> Iterator[Fragment]:
    """This rank's equal range of the concatenation of whole parameters."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    total = sum(fragment.length for fragment in fragments)
    low, high = total * rank // world, total * (rank + 1) // world
    start = 0
    for whole in fragments:
        first, last = max(low, start) - start, min(high, start + whole.length) - start
        if first < last:
            factors = whole.factors if first == 0 else {}
            state, kinds = whole.state, whole.kinds
            yield Fragment(whole.name, first, last - first, whole.master, first, state, kinds, factors)
        start += whole.length
