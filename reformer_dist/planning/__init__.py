"""What a run will need, from its configuration: memory by part, traffic, arithmetic. See docs/planning.md."""

from reformer_dist.planning.plan import Plan, make_plan
from reformer_dist.planning.report import describe
from reformer_dist.planning.sizes import Job

__all__ = ["Job", "Plan", "describe", "make_plan"]
