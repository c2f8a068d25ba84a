"""Settings of dynamic ids, and the split into buckets."""

from typing import Any

import pytest

from cluster.errors import ConfigError
from embeddings.ids.config import BUCKETS, IdsConfig, buckets_of, rows_per_bucket, table_rows


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"user_rows": 0}, "ids.user_rows=0: must be at least 1"),
        ({"item_rows": -3}, "ids.item_rows=-3: must be at least 1"),
        ({"admit_after": 0}, "ids.admit_after=0: must be at least 1"),
        ({"ttl_steps": 0}, "ids.ttl_steps=0: must be at least 1"),
        ({"evict": "lru"}, 'ids.evict="lru": must be one of lfu, ttl, none'),
        ({"halve_every": -1}, "ids.halve_every=-1: must be 0"),
        ({"pending_share": 0.0}, r"ids.pending_share=0.0: must be in \(0, 16\]"),
    ],
)
def test_settings_out_of_range_are_refused(
    setting: dict[str, Any], message: str
) -> None:  # Any: each setting has its type
    with pytest.raises(ConfigError, match=message):
        IdsConfig(**setting)


@pytest.mark.parametrize(
    ("capacity", "per_bucket", "rows"), [(1, 1, 240), (240, 1, 240), (241, 2, 480), (100_000, 417, 100_080)]
)
def test_a_capacity_is_rounded_up_to_whole_buckets(capacity: int, per_bucket: int, rows: int) -> None:
    assert rows_per_bucket(capacity) == per_bucket
    assert table_rows(capacity) == rows


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 12, 240])
def test_every_bucket_has_one_owner(workers: int) -> None:
    owned = [buckets_of(worker, workers) for worker in range(workers)]
    assert [bucket for buckets in owned for bucket in buckets] == list(range(BUCKETS))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_more_workers_than_buckets_are_refused() -> None:
    with pytest.raises(ConfigError, match="240 buckets go round 240 workers at most"):
        buckets_of(0, 241)
