"""Parameter counts, and memory of weights, gradients and optimizer states on one rank with DeepSpeed 0.19.8.

Notation as in docs/planning.md: N parameters, N_p of them owned by this rank, e bytes per weight. Gradients are
float32 whatever the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from reformer_dist.config import Average, OptimConfig, Precision
from reformer_dist.engine.groups import Update, freeze, parameter_groups
from reformer_dist.models import ReformerEncoderDecoder
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.block import Block
from reformer_dist.planning.sizes import JobSpec

MemoryBreakdown = dict[str, float]

WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS = "weights", "gradients", "optimizer states", "ZeRO buffers"
AVERAGE, CHECKPOINT_COPY = "weight average", "checkpoint buffer"
# DeepSpeed's defaults for sizes that the configuration does not set
STAGE0_REDUCE_ELEMENTS = 500_000_000
STAGE3_LIVE_PARAMETERS = 1_000_000_000
ALIGNMENT = 2  # elements per rank
GRADIENT_BYTES = 4.0


@dataclass(frozen=True)
class BlockCount:
    """Parameters of one layer, norms included."""

    attention: int
    feed_forward: int
    cross_attention: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.cross_attention + self.feed_forward


@dataclass(frozen=True)
class GroupCount:
    """Parameters of an optimizer group."""

    update: Update
    lr: float
    weight_decay: float
    shapes: list[tuple[int, ...]]

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [torch.Size(shape).numel() for shape in self.shapes]

    @property
    def moments(self) -> int:
        """Optimizer states per element."""
        return len(self.update.moments)

    @property
    def factors(self) -> int:
        """Elements of the optimizer states of whole tensors."""
        return sum(map(sum, self.shapes)) if self.update is Update.adafactor else 0


@dataclass(frozen=True)
class ParameterCount:
    total: int
    """Frozen ones included."""
    embedding: int
    blocks: list[BlockCount]
    """Per distinct block: fewer than layers with model.share_layers."""
    above: int
    """The last norm and the head, without a tied embedding."""
    groups: list[GroupCount]
    """Of the optimizer, without frozen parameters."""
    encoder_blocks: list[BlockCount]
    """Blocks of the encoder of an encoder-decoder; its last norm is `above_encoder`."""
    above_encoder: int

    @property
    def largest(self) -> int:
        """Elements of the largest tensor that is trained."""
        return max(max(group.sizes) for group in self.groups)

    @property
    def trained(self) -> int:
        return sum(sum(group.sizes) for group in self.groups)

    @property
    def frozen(self) -> int:
        return self.total - self.trained


def count_parameters(build_model: Callable[[], nn.Module], optim: OptimConfig | None = None) -> ParameterCount:
    """Parameter counts of a model, which is built on the meta device, under AdamW by default.

    Raises ConfigError for optim.groups that do not fit the model.
    """
    with torch.device("meta"):
        model = build_model()
    assert isinstance(model, ReformerModel)
    encoder = model.encoder if isinstance(model, ReformerEncoderDecoder) else None
    blocks = [_count_block(block) for block in model.stack.blocks]
    encoder_blocks = [_count_block(block) for block in encoder.blocks] if encoder else []
    above_encoder = _count(encoder.norm) if encoder else 0
    total, embedding = _count(model), _count(model.embedding)
    optim = optim or OptimConfig()
    freeze(model, optim)
    groups = [
        GroupCount(
            group.update,
            optim.lr * group.lr_scale,
            group.weight_decay,
            [tuple(p.shape) for p in group.parameters.values()],
        )
        for group in parameter_groups(model, optim)
    ]
    above = total - embedding - above_encoder - sum(block.total for block in blocks + encoder_blocks)
    return ParameterCount(total, embedding, blocks, above, groups, encoder_blocks, above_encoder)


def _count_block(block: nn.Module) -> BlockCount:
    assert isinstance(block, Block)
    attention = _count(block.attention_norm) + _count(block.attention)
    cross = _count(block.cross_attention_norm) + _count(block.cross_attention) if block.has_cross_attention else 0
    return BlockCount(attention, _count(block) - attention - cross, cross)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class ModelStateMemory:
    """Weights, gradients and optimizer states of one rank."""

    job: JobSpec
    count: ParameterCount

    @property
    def stage(self) -> int:
        return self.job.config.deepspeed.stage

    @property
    def width(self) -> int:
        """e: bytes per weight."""
        return self.job.weight_bytes

    @property
    def owned(self) -> list[int]:
        """N_p: elements of each optimizer group on this rank, padding included."""
        world, groups = self.job.world_size, [group.sizes for group in self.count.groups]
        if self.stage == 0:
            return [sum(group) for group in groups]
        if self.stage == 3:
            return [sum(-(-numel // world) for numel in group) for group in groups]
        return [-(-sum(group) // (ALIGNMENT * world)) * ALIGNMENT for group in groups]

    @property
    def whole(self) -> int:
        """Elements of all groups over all ranks, with the padding of the stage."""
        return sum(self.owned) * (1 if self.stage == 0 else self.job.world_size)

    def held(self) -> MemoryBreakdown:
        """Persistent memory, allocated at the first step or the first save."""
        held = self._weights_and_optimizer() | self._average() | self._checkpoint_copy()
        if self.job.device == "cpu":  # each rank keeps a part of the frozen weights in float32, on the host
            held[WEIGHTS] += 4.0 * self.count.frozen / self.job.world_size
        return held

    @property
    def _moments(self) -> float:
        """Elements of the optimizer states of this rank."""
        groups = self.count.groups
        own = sum(group.moments * owned for group, owned in zip(groups, self.owned, strict=True))
        return own + sum(group.factors for group in groups)

    @property
    def _averages(self) -> int:
        """Averages per weight."""
        return {Average.none: 0, Average.exponential: 1, Average.window: 2}[self.job.config.optim.average]

    def _average(self) -> MemoryBreakdown:
        return {AVERAGE: 4.0 * self._averages * sum(self.owned)} if self._averages else {}

    def _checkpoint_copy(self) -> MemoryBreakdown:
        """Host copy of what this rank saves, for asynchronous checkpoints."""
        trainer = self.job.config.trainer
        if self.job.device != "cpu" or (trainer.save_every == 0 and trainer.keep_best is None):
            return {}
        n_shards = self.job.world_size if self.stage == 0 else 1
        trained = (1 + self._averages) * sum(self.owned) + self._moments
        return {CHECKPOINT_COPY: 4.0 * trained / n_shards + 4.0 * self.count.frozen / self.job.world_size}

    def _weights_and_optimizer(self) -> MemoryBreakdown:
        n_owned, e = sum(self.owned), self.width
        if self.stage == 0:
            return {WEIGHTS: 4.0 * self.count.total, OPTIMIZER: 4.0 * self._moments}
        weights = e * (self.whole + self.count.frozen)
        parts: MemoryBreakdown = {WEIGHTS: weights, OPTIMIZER: 4.0 * (n_owned + self._moments), BUFFERS: 0.0}
        offloads = self.job.config.deepspeed.offload_optimizer
        if self.stage == 3:
            # gathered weights are kept up to this number of live parameters
            n_shard = n_owned + self.count.frozen / self.job.world_size
            parts[WEIGHTS] = e * (n_shard + min(self.count.total, STAGE3_LIVE_PARAMETERS))
            parts[GRADIENTS] = GRADIENT_BYTES * n_owned
        elif offloads:
            parts[BUFFERS] += e * n_owned + 2 * e * self.count.largest
        if offloads:
            parts[GRADIENTS] = parts.get(GRADIENTS, 0.0) + GRADIENT_BYTES * n_owned
        return parts

    def during_backward(self, reduced: int, fresh: int) -> MemoryBreakdown:
        """Gradients when `reduced` elements are reduced or accumulated and `fresh` have just been computed."""
        accumulates = self.job.n_micro > 1
        # no more than are trained; which of the frozen ones are among them is not counted
        reduced, fresh = (min(elements, self.count.trained) for elements in (reduced, fresh))
        fresh_bytes = GRADIENT_BYTES * fresh
        if self.stage == 0:
            return {GRADIENTS: GRADIENT_BYTES * (self.count.trained if accumulates else reduced) + fresh_bytes}
        parts: MemoryBreakdown = {GRADIENTS: fresh_bytes, BUFFERS: self._bucket(reduced)}
        if self.stage == 1 and accumulates:
            parts[GRADIENTS] += GRADIENT_BYTES * (self.count.trained - reduced)
        if self.stage in (1, 2) and (reduced > self._bucket_elements or (self.stage == 2 and accumulates)):
            parts[GRADIENTS] += GRADIENT_BYTES * sum(self.owned)
        return parts

    def in_reduction(self) -> MemoryBreakdown:
        """While the last gradients of a step are reduced over the ranks."""
        total = self.count.trained
        if self.stage == 0:
            flat = GRADIENT_BYTES * min(total, STAGE0_REDUCE_ELEMENTS) if self.job.world_size > 1 else 0.0
            return {GRADIENTS: GRADIENT_BYTES * total, BUFFERS: flat}
        copied = GRADIENT_BYTES * min(total, self._bucket_elements)
        if self.stage == 3:
            return {BUFFERS: self._bucket(total) + copied * (1 + 1 / self.job.world_size)}
        return {GRADIENTS: GRADIENT_BYTES * sum(self.owned), BUFFERS: self._bucket(total) + copied}

    def during_step(self) -> MemoryBreakdown:
        """During the optimizer step. Fused AdamW has no temporaries."""
        if self.stage == 0:
            return {GRADIENTS: GRADIENT_BYTES * self.count.trained, BUFFERS: self._of_matrices()}
        # in low precision, stages 1 and 2 have already accumulated them in one tensor per group
        is_flat = self.stage < 3 and self.width < 4
        parts: MemoryBreakdown = {
            GRADIENTS: 0.0 if is_flat else GRADIENT_BYTES * max(self.owned),
            BUFFERS: self._of_matrices(),
        }
        if self.stage == 3:
            parts[BUFFERS] += self._bucket(self.count.trained)
            # released after backward
            parts[WEIGHTS] = -float(self.width * min(self.count.total, STAGE3_LIVE_PARAMETERS))
        else:
            parts[GRADIENTS] += GRADIENT_BYTES * sum(self.owned)
        return parts

    def _of_matrices(self) -> float:
        """Temporaries of the update of the largest matrix: Muon's products and exchange, Adafactor's sums."""
        n_shards = 1 if self.stage == 0 else self.job.world_size
        most = 0.0
        for group in self.count.groups:
            largest = max(group.sizes)
            if group.update is Update.muon:
                products = 3.0 * (4 if self.job.config.trainer.precision is Precision.fp32 else 2)
                most = max(most, largest * (products + (16.0 if n_shards > 1 else 0.0)))
            elif group.update is Update.adafactor:
                most = max(most, 8.0 * largest / n_shards)
        return most

    def gathering(self) -> MemoryBreakdown:
        """Stage 3: during the all-gather of weights into one flat buffer."""
        if self.stage < 3:
            return {}
        return {BUFFERS: self.width * min(self.count.total, STAGE3_LIVE_PARAMETERS) + self._bucket(0)}

    @property
    def _bucket_elements(self) -> int:
        return self.job.config.deepspeed.reduce_bucket_size

    def _bucket(self, filled: int) -> float:
        """The gradient bucket. On a CPU only its filled part is resident."""
        size = self._bucket_elements
        return GRADIENT_BYTES * (size if self.job.device == "cuda" else min(filled, size))
