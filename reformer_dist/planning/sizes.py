"""Sizes of a job, and of the tensors of one micro-batch on one of its ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reformer_dist.config import AttentionKind, ModelConfig, Precision, RunConfig, TaskConfig, TaskKind
from reformer_dist.parallel.traffic import LayerShape, choose_mesh


@dataclass(frozen=True)
class JobSpec:
    """A configuration with a number of ranks."""

    config: RunConfig
    world_size: int
    ranks_per_node: int
    vocab_size: int
    device: str
    """"cpu" or "cuda"."""

    @property
    def n_micro(self) -> int:
        """Micro-batches per step. Raises ConfigError if the batch does not divide."""
        return self.config.micro_batching(self.world_size)[1]

    @property
    def uses_autocast(self) -> bool:
        """Whether weights are float32 and matrix products run in bf16 under autocast."""
        return self.config.deepspeed.stage == 0 and self.config.trainer.precision is Precision.bf16

    @property
    def weight_bytes(self) -> int:
        """Bytes per weight of the model."""
        return 4 if self.config.trainer.precision is Precision.fp32 or self.uses_autocast else 2

    @property
    def layer_shape(self) -> LayerShape:
        model = self.config.model
        return LayerShape(
            rows=self.config.micro_batching(self.world_size)[0],
            slice_len=-(-self.config.data.seq_len // self.config.parallel.sequence),
            n_heads=model.n_heads,
            head_dim=model.resolved_head_dim,
            n_hashes=model.n_hashes + model.local_round,
            n_buckets=model.n_buckets,
            element_size=4 if self.config.trainer.precision is Precision.fp32 else 2,
            own_keys=not model.shared_qk,
        )

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """(heads, buckets) of the ranks that share a sequence, chosen as in training."""
        return choose_mesh(self.config.parallel.meshes(), self.layer_shape, self.ranks_per_node)

    @property
    def encoder(self) -> JobSpec | None:
        """The encoder of an encoder-decoder, as the job of a bidirectional model over the sources."""
        config = self.config
        if config.task.kind is not TaskKind.sequence_to_sequence:
            return None
        heads, buckets = self.mesh_shape
        encoder_config = replace(
            config,
            task=TaskConfig(kind=TaskKind.sequence_classification),
            model=config.model.encoder(),
            data=replace(config.data, seq_len=config.task.max_source_len),
            parallel=replace(config.parallel, heads=heads, buckets=buckets),
        )
        return replace(self, config=encoder_config)

    @property
    def is_masked(self) -> bool:
        """Whether rows are padded, so that exact attention needs a mask matrix."""
        return not self.config.task.packs_text and self.config.task.kind is not TaskKind.completion


@dataclass(frozen=True)
class Sizes:
    """Bytes of each kind of tensor of one micro-batch on one rank."""

    tokens: int
    stream: int
    """One residual stream: [tokens, dim] float32."""
    hidden: int
    """[tokens, dim] in the dtype of the sublayers."""
    heads: int
    """q, k, v or the output of attention: [tokens, n_heads * head_dim] in that dtype."""
    inner: int
    """[tokens, ff_dim] in that dtype."""
    per_head: int
    """[tokens, n_heads] float32: a logsumexp."""
    ids: int
    """Bucket ids of the tokens in all rounds."""
    layer_ids: int
    """Those of one LSH layer: of queries and keys, if both have their own."""
    statistics: int
    """Mean and standard deviation of a layer norm."""

    @staticmethod
    def of(job: JobSpec) -> Sizes:
        shape, model = job.layer_shape, job.config.model
        tokens, width = shape.rows * shape.slice_len, shape.element_size
        return Sizes(
            tokens=tokens,
            stream=tokens * model.dim * 4,
            hidden=tokens * model.dim * width,
            heads=tokens * shape.n_heads * shape.head_dim * width,
            inner=tokens * model.resolved_ff_dim * width,
            per_head=tokens * shape.n_heads * 4,
            ids=shape.tokens * replace(shape, own_keys=False).ids,
            layer_ids=shape.tokens * shape.ids,
            statistics=tokens * 8,
        )


def n_convolutions(model: ModelConfig, kind: AttentionKind) -> int:
    """Convolutions of a layer's queries and keys."""
    return n_projections(model, kind) - 1 if kind is AttentionKind.lsh and model.qk_conv else 0


def n_projections(model: ModelConfig, kind: AttentionKind) -> int:
    """Projections of a layer's input: q and v, and k if keys are not shared with the queries."""
    return 2 if kind is AttentionKind.lsh and model.shared_qk else 3
