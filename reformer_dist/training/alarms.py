"""Alarms: warnings, each once in a run, about attention that finds too little and layers that invert badly."""

from __future__ import annotations

from reformer_dist.config import Precision, Recompute, RunConfig
from reformer_dist.process.log import logger

LOW_COVERAGE = 1.5  # times what a random choice of as many pairs covers
MOST_PAIRS = 0.25  # where LSH attends to more of the pairs, there is little to find
LARGE_DRIFT = {Precision.fp32: 1e-2, Precision.bf16: 0.1, Precision.fp16: 0.1}  # the latter round inputs to 2^-8


class Alarms:
    """Compares what evaluations measure with thresholds."""

    def __init__(self, config: RunConfig) -> None:
        self._model, self._precision = config.model, config.trainer.precision
        self._raised: set[str] = set()

    def check_coverage(self, layers: list[list[dict[str, float]]]) -> None:
        """layers: `mass` and `pairs` of each head of each LSH layer, as `Coverage.by_head` returns them."""
        for index, heads in enumerate(layers):
            blind = [
                f"{number} ({head['mass']:.3f} on {head['pairs']:.3f} of the pairs)"
                for number, head in enumerate(heads)
                if head["pairs"] < MOST_PAIRS and head["mass"] < LOW_COVERAGE * head["pairs"]
            ]
            if blind:
                self._warn(
                    f"coverage {index}",
                    f"LSH layer {index}: heads {', '.join(blind)} cover hardly more of exact attention's softmax "
                    f"mass than a random choice; more than model.n_hashes={self._model.n_hashes} rounds or a "
                    f"model.window above {self._model.window} find more",
                )

    def check_drift(self, drift: float) -> None:
        """drift: the largest difference between an input of the stack and its reconstruction."""
        if drift > LARGE_DRIFT[self._precision] and self._model.recompute is Recompute.reversible:
            fix = "model.recompute=checkpoint stores them, and a lower optim.lr keeps them small"
            reason = f"activations are reconstructed with errors up to {drift:.2g} (reversible/drift)"
            self._warn("drift", f"{reason}, which gradients inherit; {fix}")

    def _warn(self, name: str, message: str) -> None:
        if name not in self._raised:
            self._raised.add(name)
            logger.warning(message)
