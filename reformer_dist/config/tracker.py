"""Where metrics are sent, besides metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from reformer_dist.config.checks import ConfigGroup, require


class TrackerKind(Enum):
    tensorboard = "tensorboard"
    """Event files in output_dir/tensorboard."""
    wandb = "wandb"
    """Weights & Biases."""
    mlflow = "mlflow"
    """MLflow, on a server or in a database of the run directory."""


@dataclass(kw_only=True)
class TrackerConfig(ConfigGroup, prefix="tracker."):
    """Where metrics are sent, as chosen by tracker=tensorboard, wandb or mlflow."""

    kind: TrackerKind = TrackerKind.tensorboard
    """tensorboard, wandb or mlflow."""
    project: str = "reformer_dist"
    """Project of wandb, or experiment of mlflow."""
    name: str | None = None
    """Name of the run; null: that of output_dir."""
    offline: bool = False
    """Nothing is sent: wandb writes to output_dir/wandb, for `wandb sync`, and mlflow to output_dir/mlflow.db."""
    uri: str | None = None
    """Tracking URI of mlflow; null: MLFLOW_TRACKING_URI, or output_dir/mlflow.db."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.kind.name
        require(self.project != "", "tracker.project", "''", "must name a project")
        is_remote = self.kind is not TrackerKind.tensorboard
        require(is_remote or not self.offline, "tracker.offline", True, f"tracker={kind} has nothing to send")
        is_read = self.uri is None or self.kind is TrackerKind.mlflow
        require(is_read, "tracker.uri", self.uri, f"is read by tracker=mlflow only, not by tracker={kind}")
        requirement = "must be null with tracker.offline=true, which keeps the metrics in the run directory"
        require(self.uri is None or not self.offline, "tracker.uri", self.uri, requirement)
