"""The id table: who gets a row, who gives one up, and what a checkpoint holds.

Most tests use bucket 0 alone, with 4 rows and 2 places for pending ids.
"""

from collections.abc import Sequence

import numpy as np
import pytest

from cluster.errors import DataError
from embeddings.ids import kernels
from embeddings.ids.config import BUCKETS, IdsConfig
from embeddings.ids.table import SWEEP_STEPS, IdTable, cut_state

CAPACITY = 4 * BUCKETS
UNKNOWN = -1
COUNT_MAX = 2**32 - 1


def ids_of_bucket(bucket: int, count: int) -> list[int]:
    """The smallest ids that fall into a bucket."""
    ids = np.arange(BUCKETS * (count + 20) * 2)
    return ids[kernels.buckets_of_ids(ids) == bucket][:count].tolist()


A, B, C, D, E, F, G, H = ids_of_bucket(0, 8)


class Bucket(IdTable):
    """Bucket 0 of a table of four rows a bucket."""

    def __init__(self, **settings: object) -> None:
        super().__init__(CAPACITY, IdsConfig(**{"halve_every": 0, **settings}), range(1))

    def step(self, step: int, *seen: int) -> list[int]:
        """Assign what was seen in a step, repeats and all; return the reused rows."""
        ids, counts = np.unique(np.array(seen, np.int64), return_counts=True)
        _, reused = self.assign(ids, counts, step)
        self.verify()
        return reused.tolist()

    def rows(self, *ids: int) -> list[int]:
        return self.lookup(np.array(ids)).tolist()


def test_new_ids_take_the_lowest_rows_the_frequent_first_then_the_smaller() -> None:
    bucket = Bucket()
    assert bucket.step(0, C, B, A, A) == []
    assert bucket.rows(A, B, C, D) == [0, 1, 2, UNKNOWN]
    assert bucket.step(1, E, D, E) == [1]  # one row was free: D takes that of B, seen once like C
    assert bucket.rows(A, B, C, D, E) == [0, UNKNOWN, 2, 1, 3]


def test_a_bucket_s_rows_lie_next_to_each_other() -> None:
    table, ids = IdTable(CAPACITY, IdsConfig()), np.arange(2000)
    rows, _ = table.assign(ids, np.ones(2000, np.int64), 0)
    in_rows = rows >= 0
    assert (rows[in_rows] // 4).tolist() == kernels.buckets_of_ids(ids[in_rows]).tolist()
    assert len(table) == len(set(rows[in_rows].tolist())) == int(in_rows.sum())


def test_the_order_of_the_ids_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    one, other = (IdTable(500, IdsConfig(halve_every=3)) for _ in range(2))
    for step in range(40):
        ids, counts = np.unique(rng.zipf(1.2, 400), return_counts=True)
        order = rng.permutation(ids.size)
        rows, reused = one.assign(ids, counts, step)
        rows_too, reused_too = other.assign(ids[order], counts[order], step)
        assert np.array_equal(rows[order], rows_too)
        assert np.array_equal(reused, reused_too)
    assert_same(one.state(), other.state())


def test_the_least_frequent_gives_up_its_row_and_ties_the_longest_unseen() -> None:
    bucket = Bucket()
    bucket.step(0, A, A, B, C, C, D)  # rows: A 0, C 1, B 2, D 3
    bucket.step(1, A)
    assert bucket.step(2, E) == [2]  # B and D were seen once and equally long ago: the lower row
    assert bucket.step(3, F) == [3]  # D was seen before E
    assert bucket.step(4, G) == [2]  # E was seen before F
    assert bucket.rows(A, C, F, G, B, D, E) == [0, 1, 3, 2, UNKNOWN, UNKNOWN, UNKNOWN]


def test_an_id_seen_once_does_not_displace_one_seen_twice_until_it_returns() -> None:
    bucket = Bucket()
    bucket.step(0, *[A, B, C, D] * 2)
    for step in range(1, 20):
        assert bucket.step(step, *ids_of_bucket(0, 40)[4 + step : 5 + step]) == []
    assert bucket.step(20, E) == []
    assert bucket.step(21, E) == [0]
    assert bucket.rows(A, B, C, D, E) == [UNKNOWN, 1, 2, 3, 0]


def test_the_id_pushed_out_starts_from_nothing() -> None:
    bucket = Bucket()
    bucket.step(0, *[A, B, C, D] * 3)
    assert bucket.step(1, *[E] * 3) == [0]
    assert bucket.step(2, A, A) == []
    assert bucket.step(3, A) == [1]


def test_a_row_used_in_a_step_keeps_its_id_in_that_step() -> None:
    bucket = Bucket()
    bucket.step(0, A, B, C, D)
    assert bucket.step(1, A, B, C, D, *[E] * 9) == []
    assert bucket.rows(A, B, C, D, E) == [0, 1, 2, 3, UNKNOWN]
    assert bucket.step(2, A, B, C, *[E] * 9) == [3]


def test_halving_lets_old_hits_fade() -> None:
    kept, faded = Bucket(), Bucket(halve_every=2)  # bucket 0's turn: even steps
    for bucket in (kept, faded):
        bucket.step(0, *[A] * 7, *[B, C, D] * 9)
        bucket.step(1)
        bucket.step(2)  # 7 becomes 3
        bucket.step(3)
        bucket.step(4)  # 3 becomes 1
    assert kept.step(5, E) == []
    assert faded.state()["row_count"].tolist() == [2, 2, 2, 1]
    assert faded.step(5, E) == [3]


def test_ids_unseen_for_long_lose_their_row_at_the_bucket_s_sweep() -> None:
    bucket = Bucket(evict="ttl", ttl_steps=SWEEP_STEPS - 1)
    bucket.step(0, A, B)
    bucket.step(1, B)
    bucket.step(SWEEP_STEPS - 1)
    assert bucket.rows(A, B) == [0, 1]
    assert bucket.step(SWEEP_STEPS, C) == [0]  # A was unseen for 60 steps, B for 59
    assert bucket.rows(A, B, C) == [UNKNOWN, 1, 0]
    bucket.step(SWEEP_STEPS + 1, C)
    bucket.step(2 * SWEEP_STEPS)
    assert len(bucket) == 1
    assert bucket.step(2 * SWEEP_STEPS + 1, D, E) == [1]  # row 2 had no id before
    assert bucket.rows(B, C, D, E) == [UNKNOWN, 0, 1, 2]


def test_without_eviction_a_full_bucket_refuses() -> None:
    bucket = Bucket(evict="none")
    bucket.step(0, A, B, C, D)
    assert bucket.step(10**6, *[E] * 100) == []
    assert bucket.rows(A, B, C, D, E) == [0, 1, 2, 3, UNKNOWN]


def test_an_id_gets_its_row_when_it_is_seen_often_enough() -> None:
    bucket = Bucket(admit_after=3)
    bucket.step(0, A, *[B] * 3)
    bucket.step(1, A)
    assert bucket.rows(A, B) == [UNKNOWN, 0]
    bucket.step(2, A)
    assert bucket.rows(A, B) == [1, 0]
    assert bucket.state()["row_count"].tolist() == [3, 3, 0, 0]


def test_the_oldest_pending_id_is_forgotten_when_its_ring_is_full() -> None:
    bucket = Bucket(admit_after=3)  # two places
    bucket.step(0, A, A)
    bucket.step(1, B, B)
    bucket.step(2, C, C)  # forgets A
    bucket.step(3, A)  # seen once again, forgets B
    assert bucket.state()["pending_id"].tolist() == [C, A]
    assert bucket.state()["pending_count"].tolist() == [2, 1]
    bucket.step(4, A, C)
    assert bucket.rows(A, C) == [UNKNOWN, 0]


def test_looking_up_changes_nothing() -> None:
    bucket = Bucket(admit_after=2)
    bucket.step(0, A, A, B)
    before = bucket.state()
    bucket.rows(A, B, C, A)
    assert_same(before, bucket.state())


def test_counts_stop_at_32_bits() -> None:
    bucket = Bucket()
    for step, counts in enumerate(([2**62, 1], [2**62, COUNT_MAX], [1, 1])):
        bucket.assign(np.array([A, B]), np.array(counts), step)
    assert bucket.state()["row_count"].tolist() == [COUNT_MAX, COUNT_MAX, 0, 0]


def test_the_smallest_and_the_largest_id_have_rows() -> None:
    table, ids = IdTable(CAPACITY, IdsConfig()), np.array([2**63 - 1, 0], np.uint64)
    rows, _ = table.assign(ids, np.array([1, 1]), 0)
    assert rows.min() >= 0
    assert np.array_equal(table.lookup(ids), rows)
    table.verify()


def test_no_ids_are_a_step_too() -> None:
    rows, reused = Bucket().assign(np.empty(0, np.int64), np.empty(0, np.int64), 0)
    assert (rows.size, reused.size) == (0, 0)


@pytest.mark.parametrize(
    ("ids", "counts", "step", "message"),
    [
        ([A, -1, -2], [1, 1, 1], 0, "id -1 at position 1: must be at least 0"),
        ([A, B], [1], 0, r"counts of shape \(1,\) for 2 ids"),
        ([A, B], [1, 0], 0, "each at least 1"),
        ([A], [1], 2**31 - 1, "step 2147483647: must be in"),
        ([A], [1], -1, "step -1: must be in"),
    ],
)
def test_what_cannot_be_counted_is_refused(ids: list[int], counts: list[int], step: int, message: str) -> None:
    bucket = Bucket()
    with pytest.raises(DataError, match=message):
        bucket.assign(np.array(ids), np.array(counts), step)
    assert_same(bucket.state(), Bucket().state())


def test_an_id_of_another_owner_is_refused() -> None:
    (stranger,) = ids_of_bucket(1, 1)
    with pytest.raises(ValueError, match=f"id {stranger} at position 1"):
        Bucket().lookup(np.array([A, stranger]))


def test_arrays_of_any_kind_share_the_compiled_kernels() -> None:
    bucket, ids = Bucket(), np.array([A, B, C])
    bucket.assign(ids, np.ones(3, np.int64), 0)
    before = (len(kernels.count.signatures), len(kernels.look_up.signatures), len(kernels.admit.signatures))
    read_only = ids.copy()
    read_only.flags.writeable = False
    for step, kind in enumerate((ids.astype(np.int32), np.repeat(ids, 2)[::2], read_only, ids.astype(np.uint64)), 1):
        assert bucket.assign(kind, kind * 0 + 1, step)[0].tolist() == [0, 1, 2]
        assert bucket.lookup(kind).tolist() == [0, 1, 2]
    assert before == (len(kernels.count.signatures), len(kernels.look_up.signatures), len(kernels.admit.signatures))


@pytest.mark.parametrize("admit_after", [1, 3])
@pytest.mark.parametrize("evict", ["lfu", "ttl"])
def test_state_goes_from_one_owner_to_two_and_back_and_decides_as_before(evict: str, admit_after: int) -> None:
    config = IdsConfig(evict=evict, admit_after=admit_after, halve_every=9, ttl_steps=15)
    whole = range(BUCKETS)
    one = [IdTable(700, config, whole)]
    run(one, range(60))
    two = moved(one, config, [range(90), range(90, BUCKETS)])
    back = moved(two, config, [whole])
    assert_same(back[0].state(), one[0].state())

    rows = run(one, range(60, 120))
    assert run(two, range(60, 120)) == rows
    assert run(back, range(60, 120)) == rows
    assert_same(joined(two), one[0].state())
    assert_same(back[0].state(), one[0].state())


def run(owners: Sequence[IdTable], steps: range) -> list[dict[int, int]]:
    """Give the owners a stream, each what falls into its buckets; return rows and reused rows of every step."""
    seen = []
    for step in steps:
        ids, counts = np.unique(np.random.default_rng(step).zipf(1.1, 900) % 3000, return_counts=True)
        rows: dict[int, int] = {}
        for table in owners:
            here = np.isin(kernels.buckets_of_ids(ids), table.buckets)
            mapped, reused = table.assign(ids[here], counts[here], step)
            rows |= dict(zip(ids[here].tolist(), mapped.tolist(), strict=True)) | {-1 - row: row for row in reused}
            table.verify()
        seen.append(rows)
    return seen


def joined(owners: Sequence[IdTable]) -> dict[str, np.ndarray]:
    states = [table.state() for table in owners]
    return {name: np.concatenate([state[name] for state in states]) for name in states[0]}


def moved(owners: Sequence[IdTable], config: IdsConfig, ranges: list[range]) -> list[IdTable]:
    whole, new = joined(owners), [IdTable(700, config, buckets) for buckets in ranges]
    for table in new:
        table.load_state(cut_state(whole, table.buckets))
        table.verify()
    return new


def assert_same(state: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert state.keys() == other.keys()
    for name, array in state.items():
        assert array.dtype == other[name].dtype
        assert np.array_equal(array, other[name]), name


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("row_id", np.array([A, B, A, -1]), f"id {A} stands twice"),
        ("row_id", np.array([A, ids_of_bucket(1, 1)[0], -1, -1]), "in a bucket that is not its own"),
        ("row_id", np.array([A, -7, -1, -1]), "id -7"),
        ("row_id", np.array([A]), r"row_id: int64 \(1,\); must be int64 \(4,\)"),
        ("row_count", np.zeros(4), "row_count: float64"),
        ("pending_next", None, "pending_next: nothing"),
    ],
)
def test_a_broken_state_is_refused(name: str, broken: np.ndarray | None, message: str) -> None:
    state = {**Bucket().state(), name: broken}
    with pytest.raises(DataError, match=message):
        Bucket().load_state({key: array for key, array in state.items() if array is not None})


def test_verifying_notices_two_ids_in_one_row() -> None:
    bucket = Bucket()
    bucket.step(0, A, B)
    bucket._store.slots[bucket._store.slots[:, 0] == B, 1] = 0
    with pytest.raises(AssertionError, match=f"id {B} does not map back"):
        bucket.verify()


def test_verifying_notices_an_id_that_nothing_holds() -> None:
    bucket = Bucket()
    bucket.step(0, A, B)
    bucket._store.row_id[1] = -1
    with pytest.raises(AssertionError, match="2 ids are mapped, 1 are held"):
        bucket.verify()
