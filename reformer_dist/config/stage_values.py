"""The values of a run's stages, and the steps at which stages end."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from reformer_dist.config.checks import one_of
from reformer_dist.config.keywords import nearest
from reformer_dist.errors import ConfigError

MODEL_KEYS = ("n_buckets", "n_hashes", "window", "local_window", "rotary_base")
"""Of model.*: no parameter depends on them."""
STAGED_KEYS = (
    *("data.seq_len", "data.batch_size", "data.weights", "trainer.micro_batch_size"),
    *(f"model.{key}" for key in MODEL_KEYS),
)
STEPS, TOKENS = "until", "until_tokens"


def stage_spans(
    stages: Sequence[Mapping[str, Any]], seq_len: int, batch_size: int
) -> Iterator[tuple[dict[str, Any], int | None]]:
    """(values, steps done at the end) of each stage; after an end, the values of the run are in force again.

    seq_len, batch_size: of the run. Raises ConfigError.
    """
    step = tokens = 0
    for index, stage in enumerate(stages):
        values = {key: value for key, value in stage.items() if key not in (STEPS, TOKENS)}
        _check_keys(index, stage, values, is_last=index == len(stages) - 1)
        if STEPS not in stage and TOKENS not in stage:
            yield values, None
            return
        per_step = values.get("data.seq_len", seq_len) * values.get("data.batch_size", batch_size)
        if STEPS in stage:
            end = _count(index, STEPS, stage[STEPS], step, "steps")
        else:
            end = step - (tokens - _count(index, TOKENS, stage[TOKENS], tokens, "tokens")) // per_step
        tokens += (end - step) * per_step
        step = end
        yield values, end
    yield {}, None


def saved_in_force(saved: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A saved configuration without stages, with the values in force at the last of `step` steps.

    Raises ConfigError if its stages are invalid.
    """
    stages = saved.get("stages", [])
    if not stages:
        return dict(saved)
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        raise ConfigError(f"stages={str(stages)[:200]}: must be a list of mappings")
    config = {**copy.deepcopy(dict(saved)), "stages": []}
    for values, end in stage_spans(stages, config["data"]["seq_len"], config["data"]["batch_size"]):
        if end is None or step <= end:
            for key, value in values.items():
                group, name = key.split(".")
                config[group][name] = value
            break
    return config


@contextmanager
def naming_stage(index: int | None) -> Iterator[None]:
    """Adds the stage to the message of an error; None for one of the run itself."""
    try:
        yield
    except ConfigError as error:
        raise error if index is None else ConfigError(f"stages[{index}]: {error}") from error


def _check_keys(index: int, stage: Mapping[str, Any], values: Mapping[str, Any], *, is_last: bool) -> None:
    for key, value in values.items():
        if key not in STAGED_KEYS:
            similar = nearest(key, STAGED_KEYS)
            hint = f"did you mean {similar}? " if similar else ""
            requirement = f"is no key of a stage; {hint}A stage sets {one_of(STAGED_KEYS)}"
            raise ConfigError(f"stages[{index}].{key}={value}: {requirement}")
        is_count = type(value) is int and value > 0
        if key in ("data.seq_len", "data.batch_size") and not is_count:
            raise ConfigError(f"stages[{index}].{key}={value}: must be a whole number above 0")
    ends = [key for key in (STEPS, TOKENS) if key in stage]
    if len(ends) == 2 or (not ends and not is_last):
        requirement = f"must have either {STEPS} (steps) or {TOKENS}; only the last stage may have neither"
        raise ConfigError(f"stages[{index}]={dict(stage)}: {requirement}")


def _count(index: int, key: str, value: Any, before: int, unit: str) -> int:
    """A number of steps or tokens at which a stage ends."""
    if type(value) is not int or value <= before:
        requirement = f"must be a whole number above {before}, the {unit} at which the stage begins"
        raise ConfigError(f"stages[{index}].{key}={value}: {requirement}")
    return value
