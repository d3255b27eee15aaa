"""How ranks share one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.config.checks import at_least, check_types, require
from reformer_dist.errors import ConfigError

LONGEST_TIMEOUT = 30 * 24 * 3600


@dataclass(kw_only=True)
class ParallelConfig:
    """Sequence parallelism: the other ranks are data-parallel."""

    sequence: int = 1
    """Ranks that share each sequence; the world must be a multiple of it."""
    heads: int | None = None
    """Ranks among which heads are exchanged; null chooses. heads * buckets = sequence."""
    buckets: int | None = None
    """Ranks among which tokens are exchanged by bucket; null chooses."""
    merge_returns: bool = True
    """False: rounds come home one by one: more bytes, and in float32 the very numbers of one rank."""
    overlap: bool = True
    """Tokens travel while others are attended; false waits for them, for comparison."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others before it ends the job."""

    def __post_init__(self) -> None:
        check_types(self, "parallel")
        at_least(1, parallel__sequence=self.sequence, parallel__heads=self.heads, parallel__buckets=self.buckets)
        require(self.timeout > 0, "parallel.timeout", self.timeout, "must be positive")
        right = f"must be at most {LONGEST_TIMEOUT} s, a month"
        require(self.timeout <= LONGEST_TIMEOUT, "parallel.timeout", self.timeout, right)
        for name, value in (("heads", self.heads), ("buckets", self.buckets)):
            if value is not None and self.sequence % value:
                raise ConfigError(f"parallel.{name}={value}: must divide parallel.sequence={self.sequence}")
        if self.heads is not None and self.buckets is not None:
            right = f"times parallel.heads={self.heads} must be parallel.sequence={self.sequence}"
            require(self.heads * self.buckets == self.sequence, "parallel.buckets", self.buckets, right)

    def meshes(self) -> list[tuple[int, int]]:
        """The (heads, buckets) that these values leave open, most heads first."""
        pairs = [(self.sequence // b, b) for b in range(1, self.sequence + 1) if self.sequence % b == 0]
        return [
            (heads, buckets)
            for heads, buckets in pairs
            if self.heads in (None, heads) and self.buckets in (None, buckets)
        ]
