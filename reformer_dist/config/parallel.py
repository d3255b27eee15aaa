"""Sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from reformer_dist.config.checks import MONTH, ConfigGroup, bounded, require
from reformer_dist.errors import ConfigError


class Combine(Enum):
    merged = "merged"
    """Each rank merges the rounds it computed for a token before it sends the result back."""
    per_round = "per_round"
    """Each round is sent back by itself: more bytes, but in float32 bit-identical to a single rank."""


@dataclass(kw_only=True)
class ParallelConfig(ConfigGroup, prefix="parallel."):
    """Degrees of sequence parallelism; the remaining factor of the world size is data parallelism."""

    sequence: int = bounded(1, least=1, most=2**16)
    """Ranks that share each sequence; must divide the world size."""
    heads: int | None = bounded(None, least=1, most=2**16)
    """Ranks that exchange heads; null chooses. heads * buckets = sequence."""
    buckets: int | None = bounded(None, least=1, most=2**16)
    """Ranks that exchange tokens by bucket; null chooses."""
    combine: Combine = Combine.merged
    """Results of bucket exchange: merged over rounds before they are sent back, or per_round."""
    overlap: bool = True
    """Communication of one group of heads overlaps with attention of another; false: it blocks, for comparison."""
    timeout: float = bounded(1800.0, above=0, most=MONTH, hint="that is a month")
    """Seconds that a rank waits for others in a collective before it ends the job."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("heads", self.heads), ("buckets", self.buckets)):
            if value is not None and self.sequence % value:
                raise ConfigError(f"parallel.{name}={value}: must divide parallel.sequence={self.sequence}")
        if self.heads is not None and self.buckets is not None:
            requirement = f"times parallel.heads={self.heads} must be parallel.sequence={self.sequence}"
            require(self.heads * self.buckets == self.sequence, "parallel.buckets", self.buckets, requirement)

    @property
    def merges_rounds(self) -> bool:
        return self.combine is Combine.merged

    def meshes(self) -> list[tuple[int, int]]:
        """All (heads, buckets) that these values allow, most heads first."""
        factors = [(self.sequence // b, b) for b in range(1, self.sequence + 1) if self.sequence % b == 0]
        return [(h, b) for h, b in factors if self.heads in (None, h) and self.buckets in (None, b)]
