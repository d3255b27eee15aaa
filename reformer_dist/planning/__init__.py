"""Estimates of a run's memory, communication and arithmetic from its configuration. See docs/planning.md."""

from reformer_dist.planning.plan import RunPlan, describe, make_plan, plan_memory
from reformer_dist.planning.sizes import JobSpec

__all__ = ["JobSpec", "RunPlan", "describe", "make_plan", "plan_memory"]
