"""Settings of dynamic ids, and how a capacity splits into buckets and buckets into workers.

In:  the recipe's `[ids]` section.  Out: checked settings, row counts, ranges of buckets.
Knows nothing of hashing or counting, and imports no compiler: drivers and the command line read it.
"""

from dataclasses import dataclass

from cluster.errors import ConfigError

BUCKETS = 240
"""Parts of a table that decide by themselves; divisible by 1–6, 8, 10, 12, 15, 16 and 20 workers."""

POLICIES = ("lfu", "ttl", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class IdsConfig:
    """Capacities, and which ids hold a row (module docstring of table.py)."""

    user_rows: int = 1_000_000
    """Capacity of the user table, rounded up to a multiple of 240."""
    item_rows: int = 100_000
    """Capacity of the item table, rounded up to a multiple of 240."""
    admit_after: int = 1
    """An id may get a row once it has been seen this many times."""
    evict: str = "lfu"
    """`lfu`: a full bucket gives up its least frequent row; `ttl`: rows unseen for long are freed; `none`: neither."""
    ttl_steps: int = 10_000
    """With `ttl`: an id unseen for more steps than this loses its row at its bucket's next sweep."""
    halve_every: int = 1_000
    """With `lfu`: every count is halved once in so many steps, so that old hits fade; 0 keeps them for good."""
    pending_share: float = 0.5
    """Ids without a row that a bucket remembers and counts, as a share of its rows (one at least)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("user_rows", "item_rows", "admit_after", "ttl_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"ids.{key}={getattr(self, key)}: must be at least 1")
        if self.evict not in POLICIES:
            raise ConfigError(f'ids.evict="{self.evict}": must be one of {", ".join(POLICIES)}')
        if self.halve_every < 0:
            raise ConfigError(f"ids.halve_every={self.halve_every}: must be 0 (never) or more")
        if not 0 < self.pending_share <= 16:
            raise ConfigError(f"ids.pending_share={self.pending_share}: must be in (0, 16]; try 0.5")


def rows_per_bucket(capacity: int) -> int:
    """Return the rows of one bucket: an equal share of the capacity, rounded up."""
    return -(-capacity // BUCKETS)


def table_rows(capacity: int) -> int:
    """Return how many rows the embedding table must have: the capacity rounded up to whole buckets."""
    return BUCKETS * rows_per_bucket(capacity)


def buckets_of(worker: int, workers: int) -> range:
    """Return the contiguous buckets that a worker owns; sizes differ by one at most."""
    if not 0 <= worker < workers <= BUCKETS:
        raise ConfigError(f"worker {worker} of {workers}: {BUCKETS} buckets go round {BUCKETS} workers at most")
    return range(BUCKETS * worker // workers, BUCKETS * (worker + 1) // workers)
