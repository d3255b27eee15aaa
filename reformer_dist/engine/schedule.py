"""The learning rate of each step: a pure function of the configuration, without state to save."""

from __future__ import annotations

import math

from reformer_dist.config import DecayShape, OptimConfig, Schedule


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule, then the decay."""
    if config.decay_from is not None and step >= config.decay_from:
        peak = _scheduled(config, max(0, config.decay_from - 1), max_steps)
        progress = _progress(step, config.decay_from, max_steps)
        return _interpolate(config, peak, _decay(config.decay, progress))
    return _scheduled(config, step, max_steps)


def _scheduled(config: OptimConfig, step: int, max_steps: int) -> float:
    """Without the decay that begins at decay_from."""
    start = max((restart for restart in config.restarts if restart <= step), default=0)
    end = min((restart for restart in config.restarts if restart > step), default=max_steps)
    warm = start + config.warmup_steps
    if step < warm:
        # a restart begins at the rate at which the schedule before it ended
        lowest = config.lr * config.min_lr_ratio if start else 0.0
        return lowest + (config.lr - lowest) * (step + 1 - start) / config.warmup_steps
    if config.schedule in (Schedule.constant, Schedule.wsd):
        return config.lr
    if config.schedule is Schedule.inverse_sqrt:
        return config.lr * math.sqrt(max(1, config.warmup_steps) / (step + 1))
    shape = DecayShape.linear if config.schedule is Schedule.linear else DecayShape.cosine
    return _interpolate(config, config.lr, _decay(shape, _progress(step, warm, end)))


def _progress(step: int, first: int, end: int) -> float:
    return min(1.0, (step - first) / max(1, end - first))


def _interpolate(config: OptimConfig, peak: float, decay: float) -> float:
    """The rate at `decay` of the way from min_lr_ratio * lr to the peak; the peak itself if that is lower."""
    lowest = min(peak, config.lr * config.min_lr_ratio)
    return lowest + (peak - lowest) * decay


def _decay(shape: DecayShape, progress: float) -> float:
    """1 at the beginning of a decay, 0 at its end."""
    if shape is DecayShape.linear:
        return 1.0 - progress
    if shape is DecayShape.cosine:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - math.sqrt(progress)
