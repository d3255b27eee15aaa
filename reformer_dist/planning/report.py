"""The plan as the lines that a user reads."""

from __future__ import annotations

from reformer_dist.planning.plan import Plan

MIB, GIB = 2**20, 2**30


def describe(plan: Plan) -> str:
    """Several lines: ranks, tokens, parameters; memory by part; traffic; and whether it fits."""
    return "\n".join([*_job_lines(plan), "", *_memory_lines(plan), "", *_traffic_lines(plan)])


def size(n_bytes: float) -> str:
    """1.50 GiB or 12.0 MiB."""
    return f"{n_bytes / GIB:,.2f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:,.1f} MiB"


def _job_lines(plan: Plan) -> list[str]:
    job, config = plan.job, plan.job.config
    micro, n_micro = config.micro_batching(job.world_size)
    heads, buckets = job.mesh_shape
    tokens = config.data.batch_size * config.data.seq_len
    of_sources = f" and {config.data.batch_size * config.task.max_source_len:,} of sources" if job.encoder else ""
    ranks = f"{job.world_size} rank{'s' if job.world_size > 1 else ''} on {job.device}"
    shared = f"{heads} x {buckets} (heads x buckets) ranks share each sequence"
    return [
        f"ranks         {ranks}, {job.ranks_per_node} on a machine; "
        f"{config.dp_size(job.world_size)} data-parallel"
        + (f", {shared}" if config.parallel.sequence > 1 else ""),
        f"step          {tokens:,} tokens{of_sources}: {config.data.batch_size} rows of {config.data.seq_len:,}, "
        f"{n_micro} micro-batch{'es' if n_micro > 1 else ''} of {micro} on each rank",
        f"parameters    {plan.n_parameters:,}; ZeRO stage {config.deepspeed.stage}, "
        f"{config.trainer.precision.name}",
        f"arithmetic    {plan.flops / 1e12:,.3f} TFLOP a step ({plan.flops / tokens / 1e6:,.1f} MFLOP a token)",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    lines = [f"memory of a rank at its peak ({plan.peak.name})"]
    for part, amount in plan.peak.parts.items():
        mark = "  <- the largest" if part == plan.largest else ""
        lines.append(f"  {part:<22}{size(amount):>12}{mark}")
    if plan.libraries:
        lines.append(f"  {'Python and libraries':<22}{size(plan.libraries):>12}  (measured here)")
    lines.append(f"  {'together':<22}{size(plan.total):>12}")
    if plan.memory_limit is None:
        lines.append("  the memory of the device is not known here; give it: --dry-run=80GiB")
    else:
        verdict = "fits in" if plan.fits else "DOES NOT FIT in"
        lines.append(f"  it {verdict} {size(plan.memory_limit)}")
    return lines


def _traffic_lines(plan: Plan) -> list[str]:
    if not plan.traffic:
        return ["traffic       none: there is one rank"]
    lines = ["traffic that a rank sends in a step"]
    lines += [f"  {part:<22}{size(amount):>12}" for part, amount in plan.traffic.items()]
    return [*lines, f"  {'together':<22}{size(sum(plan.traffic.values())):>12}"]
