"""Stages of a run: which configuration is in force at a step.

A stage sets some keys up to a step, or up to a number of tokens of text. Other keys have the values of the run.
All of this is a pure function of the configuration, so a run that was stopped in any stage, or at a border,
resumes in the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reformer_dist.config.run import RunConfig
from reformer_dist.config.stage_values import naming_stage


@dataclass(frozen=True)
class Stage:
    """Steps of a run with one configuration."""

    index: int
    first_step: int
    """Steps done when it begins."""
    end_step: int | None
    """Steps done when it ends; None if it lasts to the end of the run."""
    config: RunConfig
    """Without stages."""
    values: Mapping[str, Any]
    """What the stage sets, by key."""


def resolve_stages(config: RunConfig) -> list[Stage]:
    """The stages of a run, at least one."""
    stages, first = [], 0
    for index, (values, end) in enumerate(config.stage_spans()):
        stages.append(Stage(index, first, end, config.with_stage_values(values, index), values))
        first = end or 0
    return stages


def stage_at(config: RunConfig, step: int) -> Stage:
    """The stage of the step after `step` steps."""
    return next(stage for stage in resolve_stages(config) if stage.end_step is None or step < stage.end_step)


def check_ranks(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError if the rows of any stage can't be divided among the ranks."""
    for stage in resolve_stages(config):
        with naming_stage(stage.index if config.stages else None):
            stage.config.micro_batching(world_size)
