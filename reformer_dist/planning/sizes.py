"""The sizes from which everything else is computed: of the job, and of one micro-batch on one of its ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reformer_dist.config import Activation, AttentionKind, Precision, RunConfig, TaskConfig, TaskKind
from reformer_dist.ops.lsh.hashing import bucket_dtype
from reformer_dist.parallel.traffic import LayerShape, choose_mesh


@dataclass(frozen=True)
class JobSpec:
    """A configuration on so many ranks."""

    config: RunConfig
    world_size: int
    ranks_per_node: int
    vocab_size: int
    device: str
    """"cpu" or "cuda"."""

    @property
    def n_micro(self) -> int:
        """Micro-batches of a step. Raises ConfigError where the batch does not divide."""
        return self.config.micro_batching(self.world_size)[1]

    @property
    def autocasts(self) -> bool:
        """Weights are float32, and products are made of bf16 copies."""
        return self.config.deepspeed.stage == 0 and self.config.trainer.precision is Precision.bf16

    @property
    def weight_bytes(self) -> int:
        """Of one weight or gradient, as the model holds it."""
        return 4 if self.config.trainer.precision is Precision.fp32 or self.autocasts else 2

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
        )

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """(heads, buckets) of the ranks that share a sequence, as `share.py` chooses them."""
        return choose_mesh(self.config.parallel.meshes(), self.layer_shape, self.ranks_per_node)

    @property
    def encoder(self) -> JobSpec | None:
        """What an encoder-decoder does with its sources, as the job of a two-sided model of its own."""
        config = self.config
        if config.task.kind is not TaskKind.sequence_to_sequence:
            return None
        heads, buckets = self.mesh_shape
        of_sources = replace(
            config,
            task=TaskConfig(kind=TaskKind.sequence_classification),
            model=config.model.encoder(),
            data=replace(config.data, seq_len=config.task.max_source_len),
            parallel=replace(config.parallel, heads=heads, buckets=buckets),
        )
        return replace(self, config=of_sources)

    @property
    def is_masked(self) -> bool:
        """Whether rows are filled up behind a mask, of which exact attention makes a matrix."""
        return not self.config.task.packs_text and self.config.task.kind is not TaskKind.completion


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of one micro-batch on one rank."""

    tokens: int
    stream: int
    """A residual stream: [tokens, dim] float32."""
    hidden: int
    """[tokens, dim] in the dtype of the sublayers."""
    heads: int
    """q, k, v or the output of attention: [tokens, n_heads * head_dim] in that dtype."""
    inner: int
    """[tokens, ff_dim] in that dtype."""
    per_head: int
    """[tokens, n_heads] float32: a logsumexp."""
    ids: int
    """Bucket ids of one LSH layer."""
    statistics: int
    """Mean and deviation of a layer norm."""

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
            ids=shape.tokens * shape.n_hashes * bucket_dtype(shape.n_buckets).itemsize,
            statistics=tokens * 8,
        )


def n_projections(kind: AttentionKind) -> int:
    """Linear layers that read a layer's input: q and v, and k where keys are not the queries."""
    return 2 if kind is AttentionKind.lsh else 3


def is_gated(job: JobSpec) -> bool:
    return job.config.model.activation is Activation.glu
