"""What a run will need, from its configuration: memory by part, traffic, arithmetic. See docs/planning.md."""

from reformer_dist.planning.plan import RunPlan, describe, make_plan
from reformer_dist.planning.sizes import JobSpec

__all__ = ["JobSpec", "RunPlan", "describe", "make_plan"]
