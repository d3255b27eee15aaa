"""The only folder that knows DeepSpeed."""

from reformer_dist.engine.engine import StepResult, TrainEngine

__all__ = ["StepResult", "TrainEngine"]
