"""Training under DeepSpeed ZeRO; nothing outside this package imports deepspeed."""

from reformer_dist.engine.engine import StepResult, TrainEngine

__all__ = ["StepResult", "TrainEngine"]
