"""One sequence over several ranks: exchange by buckets, by heads, and both."""

from reformer_dist.parallel.sequence import SlicedSequence

__all__ = ["SlicedSequence"]
