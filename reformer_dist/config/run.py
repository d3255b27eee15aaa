"""RunConfig: the root of the configuration, and the checks that involve several groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from reformer_dist.config.checks import ConfigGroup, nearest_divisors, require
from reformer_dist.config.data import DataConfig, Strand
from reformer_dist.config.launcher import LauncherConfig
from reformer_dist.config.model import AttentionBackend, AttentionKind, ModelConfig, NeighbourRule
from reformer_dist.config.optim import Average, DeepSpeedConfig, OptimConfig
from reformer_dist.config.parallel import ParallelConfig
from reformer_dist.config.stage_values import STEPS, TOKENS, naming_stage, stage_spans
from reformer_dist.config.sweep import SweepConfig
from reformer_dist.config.task import TaskConfig, TaskKind
from reformer_dist.config.tracker import TrackerConfig
from reformer_dist.config.trainer import TrainerConfig
from reformer_dist.errors import ConfigError

UNPACKED = {
    TaskKind.language_model: "whose rows are packed already",
    TaskKind.masked_language_model: "whose rows are packed already",
    TaskKind.sequence_classification: "which predicts one label per row",
    TaskKind.question_answering: "which predicts one span per row",
    TaskKind.sequence_to_sequence: "whose targets attend to the source of their row",
}
"""Why the rows of a task can't hold several samples."""
CHUNKS = "chunks of the sorted order cross the borders of documents"


@dataclass(kw_only=True)
class RunConfig(ConfigGroup, prefix=""):
    """The complete configuration of a run; equal on every rank."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Values of some keys up to a step, such as [{until: 1000, data.seq_len: 512}, {until_tokens: 2000000,
    model.n_buckets: 16}]; after the last end, those of the run. See docs/growing_runs.md."""
    output_dir: str = "outputs/default"
    """The run directory: config, checkpoints and TensorBoard logs. One run, one directory."""
    resume: str = "auto"
    """auto: from the newest valid checkpoint in output_dir, if any; never; or the path of a checkpoint."""
    init_from: str | None = None
    """Fine-tuning: a run, checkpoint, export or converted model with the initial weights, unless the run resumes.
    model.* then default to those of the weights."""
    init_moments: bool = False
    """With init_from: also start with the optimizer's moments of that checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.model.max_positions
        if limit is not None:
            requirement = f"must be at most {limit}, the limit of model.position={self.model.position.name}"
            require(self.data.seq_len <= limit, "data.seq_len", self.data.seq_len, requirement)
            if self.task.kind is TaskKind.sequence_to_sequence:
                source_len = self.task.max_source_len
                require(source_len <= limit, "task.max_source_len", source_len, requirement)
        if self.model.share_layers and self.deepspeed.stage == 3:
            requirement = "excludes deepspeed.stage=3, which sums shared gradients wrongly; use stage 0, 1 or 2"
            raise ConfigError(f"model.share_layers=true: {requirement}")
        require(self.output_dir != "", "output_dir", "''", "must name a directory")
        require(self.resume != "", "resume", "''", "must be auto, never or the path of a checkpoint")
        require(self.init_from is not None or not self.init_moments, "init_moments", True, "needs init_from")
        self._check_task()
        self._check_documents()
        self._check_parallel()
        self._check_stages()
        self._check_best()

    def _check_stages(self) -> None:
        for index, (values, _) in enumerate(self.stage_spans() if self.stages else ()):
            weights = self.with_stage_values(values, index).data.weights
            if (weights is None) != (self.data.weights is None):
                reason = "with weights, each dataset has an order of its own"
                requirement = f"must be null in all stages, or in none of them and of the run: {reason}"
                raise ConfigError(f"stages[{index}].data.weights={weights}: {requirement}")
        for index, stage in enumerate(self.stages):
            if TOKENS in stage and not self.task.packs_text:
                requirement = f"counts tokens of packed text; task.kind={self.task.kind.name} needs {STEPS}"
                raise ConfigError(f"stages[{index}].{TOKENS}={stage[TOKENS]}: {requirement}")

    def stage_spans(self) -> Iterator[tuple[dict[str, Any], int | None]]:
        """(values, steps done at the end) of each stage; see stages.py."""
        return stage_spans(self.stages, self.data.seq_len, self.data.batch_size)

    def with_stage_values(self, values: Mapping[str, Any], index: int) -> RunConfig:
        """The configuration in a stage, without stages. Raises ConfigError, which names the stage."""
        groups: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            group, name = key.split(".")
            groups.setdefault(group, {})[name] = value
        with naming_stage(index):
            changed = {group: replace(getattr(self, group), **keys) for group, keys in groups.items()}
            return replace(self, stages=[], **changed)

    def _check_best(self) -> None:
        metric, average = self.trainer.keep_best, self.optim.average
        if metric is not None and metric.startswith("eval_average/") and average is Average.none:
            raise ConfigError(
                f"trainer.keep_best={metric}: needs an average; set optim.average=exponential or window"
            )

    def _check_task(self) -> None:
        task, causal = self.task, self.model.causal
        requirement = f"must be false: task.kind={task.kind.name} needs context from both sides"
        if task.is_causal:
            requirement = f"must be true: task.kind={task.kind.name} would show a bidirectional model its labels"
        require(causal == task.is_causal, "model.causal", causal, requirement)
        if self.data.strand is not Strand.forward and not task.packs_text:
            requirement = f"must be forward: task.kind={task.kind.name} reads one sample per row, from one strand"
            raise ConfigError(f"data.strand={self.data.strand.name}: {requirement}")
        if self.trainer.sample_every > 0 and task.kind is not TaskKind.language_model:
            requirement = f"must be 0: task.kind={task.kind.name} does not continue text"
            raise ConfigError(f"trainer.sample_every={self.trainer.sample_every}: {requirement}")

    def _check_documents(self) -> None:
        """Tasks and layers that can keep the documents of a row apart."""
        data, model, kind = self.data, self.model, self.task.kind
        if data.mask_documents and not self.task.packs_text:
            reason = f"task.kind={kind.name} reads samples; see data.pack_samples"
            raise ConfigError(f"data.mask_documents=true: needs rows of text, and {reason}")
        if data.pack_samples and kind is not TaskKind.completion:
            requirement = f"needs task.kind=completion, not {kind.name}, {UNPACKED[kind]}"
            raise ConfigError(f"data.pack_samples=true: {requirement}")
        key = "data.mask_documents" if data.mask_documents else "data.pack_samples"
        if data.keeps_documents_apart:
            kinds = model.layer_kinds()
            if model.neighbours is NeighbourRule.chunk and AttentionKind.lsh in kinds:
                raise ConfigError(f"{key}=true: needs model.neighbours=window; {CHUNKS}")
            if model.compat.local_chunk_len > 0 and AttentionKind.local in kinds:
                raise ConfigError(f"{key}=true: needs model.compat.local_chunk_len=0; {CHUNKS}")

    def _check_parallel(self) -> None:
        parallel, n_heads = self.parallel, self.model.n_heads
        if self.model.attention_backend is AttentionBackend.reference and parallel.sequence > 1:
            raise ConfigError(
                f"model.attention_backend=reference: needs parallel.sequence=1, not {parallel.sequence}; "
                "it supports whole sequences only"
            )
        if n_heads % parallel.sequence:
            requirement = f"parallel.sequence={parallel.sequence}: must divide model.n_heads={n_heads}, since"
            if AttentionKind.exact in [*self.model.layers, *(self.model.encoder_layers or [])]:
                reason = "exact layers are split over ranks by heads only"
                raise ConfigError(f"{requirement} {reason}; use fewer ranks, or local and lsh layers")
            if self.task.kind is TaskKind.sequence_to_sequence:
                reason = "cross attention is split over ranks by heads only"
                raise ConfigError(f"{requirement} {reason}; use fewer ranks, or more heads")
        if not any(n_heads % heads == 0 for heads, _ in parallel.meshes()):
            keys = f"parallel.heads={parallel.heads}, parallel.buckets={parallel.buckets}"
            raise ConfigError(f"{keys}: must allow a number of head ranks that divides model.n_heads={n_heads}")

    def dp_size(self, world_size: int) -> int:
        """Size of the data-parallel dimension. Raises ConfigError."""
        degree = self.parallel.sequence
        divisors = nearest_divisors(world_size, degree)
        requirement = f"must divide the {world_size} ranks of the job; {divisors} would work"
        if world_size == 1:
            requirement += f"; to start that many: launcher=local launcher.nproc_per_node={degree}"
        require(world_size % degree == 0, "parallel.sequence", degree, requirement)
        return world_size // degree

    def micro_batching(self, world_size: int) -> tuple[int, int]:
        """(rows per micro-batch, micro-batches per step) of each rank.

        Raises ConfigError if the batch is not divisible.
        """
        dp_size, batch_size = self.dp_size(world_size), self.data.batch_size
        divisors = nearest_divisors(batch_size, dp_size)
        requirement = f"must be a multiple of the {dp_size} data-parallel ranks; {divisors} of them would work"
        require(batch_size % dp_size == 0, "data.batch_size", batch_size, requirement)
        rows = batch_size // dp_size
        micro = self.trainer.micro_batch_size or rows
        divisors = nearest_divisors(rows, micro)
        rows_per_rank = f"{rows} rows of each rank (data.batch_size={batch_size})"
        requirement = f"must divide the {rows_per_rank}; {divisors} would work"
        require(rows % micro == 0, "trainer.micro_batch_size", micro, requirement)
        return micro, rows // micro
