"""The typed configuration of a run: plain values, checked on construction. Imports no other part but errors."""

from reformer_dist.config.compat import CompatConfig, StreamMerge
from reformer_dist.config.data import DataConfig, Strand
from reformer_dist.config.launcher import LauncherConfig, LauncherKind
from reformer_dist.config.model import (
    Activation,
    AttentionBackend,
    AttentionKind,
    CrossAttentionKind,
    HashScheme,
    ModelConfig,
    NeighbourRule,
    Norm,
    Pooling,
    Position,
    Recompute,
)
from reformer_dist.config.optim import (
    Average,
    DecayShape,
    DeepSpeedConfig,
    OptimConfig,
    OptimizerKind,
    ParameterGroup,
    Schedule,
)
from reformer_dist.config.parallel import Combine, ParallelConfig
from reformer_dist.config.run import RunConfig
from reformer_dist.config.sweep import SweepConfig, SweepDirection, SweepKind
from reformer_dist.config.task import TaskConfig, TaskKind, TextMetric
from reformer_dist.config.tracker import TrackerConfig, TrackerKind
from reformer_dist.config.trainer import BestMode, Precision, TrainerConfig

__all__ = [
    "Activation",
    "AttentionBackend",
    "AttentionKind",
    "Average",
    "BestMode",
    "Combine",
    "CompatConfig",
    "CrossAttentionKind",
    "DataConfig",
    "DecayShape",
    "DeepSpeedConfig",
    "HashScheme",
    "LauncherConfig",
    "LauncherKind",
    "ModelConfig",
    "NeighbourRule",
    "Norm",
    "OptimConfig",
    "OptimizerKind",
    "ParallelConfig",
    "ParameterGroup",
    "Pooling",
    "Position",
    "Precision",
    "Recompute",
    "RunConfig",
    "Schedule",
    "Strand",
    "StreamMerge",
    "SweepConfig",
    "SweepDirection",
    "SweepKind",
    "TaskConfig",
    "TaskKind",
    "TextMetric",
    "TrackerConfig",
    "TrackerKind",
    "TrainerConfig",
]
