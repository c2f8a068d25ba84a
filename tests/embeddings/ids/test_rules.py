"""The id table against its rules on plain dictionaries, one id at a time, over many steps of a drifting stream."""

import numpy as np
import pytest

from embeddings.ids.config import BUCKETS, IdsConfig, rows_per_bucket
from embeddings.ids.kernels import buckets_of_ids
from embeddings.ids.table import SWEEP_STEPS, IdTable

WORD = (1 << 64) - 1


def bucket_of(external: int) -> int:
    """MurmurHash3's finaliser, modulo 240."""
    h = external
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = ((h ^ (h >> 33)) * factor) & WORD
    return (h ^ (h >> 33)) % BUCKETS


class PlainTable:
    """What the docstring of table.py says, and no more."""

    def __init__(self, capacity: int, config: IdsConfig) -> None:
        self.config = config
        self.per_bucket = rows_per_bucket(capacity)
        self.row_of: dict[int, int] = {}
        self.holder: dict[int, int] = {}
        self.count: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.pending: dict[int, int] = {}
        places = max(1, int(self.per_bucket * config.pending_share))
        self.rings: list[list[int | None]] = [[None] * places for _ in range(BUCKETS)]
        self.next = [0] * BUCKETS

    def assign(self, counts: dict[int, int], step: int) -> tuple[list[int], list[int]]:
        every = self.config.halve_every
        if self.config.evict == "lfu" and every:
            for row in self.holder:
                if step % every == row // self.per_bucket * every // BUCKETS:
                    self.count[row] //= 2
        newcomers = []
        for external, count in counts.items():
            if (row := self.row_of.get(external)) is not None:
                self.count[row] += count
                self.seen[row] = step
                continue
            if external in self.pending:
                self.pending[external] += count
            newcomers.append((external, self.pending.get(external, count)))
        if self.config.evict == "ttl":
            for row in list(self.holder):
                is_due = row // self.per_bucket % SWEEP_STEPS == step % SWEEP_STEPS
                if is_due and step - self.seen[row] > self.config.ttl_steps:
                    del self.row_of[self.holder.pop(row)]
        reused = []
        for external, total in sorted(newcomers, key=lambda new: (-min(new[1], 255), new[0])):
            row = self.row_for(bucket_of(external), total, step) if total >= self.config.admit_after else None
            if row is None:
                self.wait(external, total)
                continue
            if row in self.seen:
                reused.append(row)
            if row in self.holder:
                del self.row_of[self.holder[row]]
            self.row_of[external], self.holder[row], self.count[row], self.seen[row] = row, external, total, step
            if external in self.pending:
                ring = self.rings[bucket_of(external)]
                ring[ring.index(external)] = None
                del self.pending[external]
        return [self.row_of.get(external, -1) for external in counts], sorted(reused)

    def row_for(self, bucket: int, total: int, step: int) -> int | None:
        rows = range(bucket * self.per_bucket, (bucket + 1) * self.per_bucket)
        free = next((row for row in rows if row not in self.holder), None)
        if free is not None:
            return free
        unlocked = [row for row in rows if self.seen[row] != step]
        if self.config.evict != "lfu" or not unlocked:
            return None
        victim = min(unlocked, key=lambda row: (self.count[row], self.seen[row], row))
        return victim if self.count[victim] <= total else None

    def wait(self, external: int, total: int) -> None:
        if external in self.pending:
            return
        bucket = bucket_of(external)
        ring, at = self.rings[bucket], self.next[bucket]
        if (oldest := ring[at]) is not None:
            del self.pending[oldest]
        ring[at], self.pending[external] = external, total
        self.next[bucket] = (at + 1) % len(ring)


def follow(config: IdsConfig, capacity: int, buckets: int, universe: int, draws: int, steps: int) -> None:
    """Draw Zipf ids whose popularity drifts, and compare every row of every step."""
    rng = np.random.default_rng(7)
    ids = rng.integers(0, 2**63 - 1, universe * BUCKETS // buckets)
    ids = ids[buckets_of_ids(ids) < buckets]
    share = 1 / np.arange(1, ids.size + 1) ** 0.8
    table, plain = IdTable(capacity, config, range(buckets)), PlainTable(capacity, config)
    reused_ever = 0
    for step in range(steps):
        popularity = np.roll(share, step // 10 * 3)
        drawn, counts = np.unique(rng.choice(ids, draws, p=popularity / popularity.sum()), return_counts=True)
        order = rng.permutation(drawn.size)
        drawn, counts = drawn[order], counts[order]
        rows, reused = table.assign(drawn, counts, step)
        expected_rows, expected_reused = plain.assign(dict(zip(drawn.tolist(), counts.tolist(), strict=True)), step)
        assert rows.tolist() == expected_rows, f"step {step}"
        assert sorted(reused.tolist()) == expected_reused, f"step {step}"
        reused_ever += reused.size
        if step % 50 == 0:
            table.verify()
    table.verify()
    assert table.lookup(ids).tolist() == [plain.row_of.get(external, -1) for external in ids.tolist()]
    assert (reused_ever > 0) == (config.evict != "none")


@pytest.mark.parametrize("admit_after", [1, 3])
@pytest.mark.parametrize("evict", ["lfu", "ttl", "none"])
def test_two_hundred_rows_a_bucket_follow_the_rules(evict: str, admit_after: int) -> None:
    config = IdsConfig(evict=evict, admit_after=admit_after, halve_every=40, ttl_steps=20)
    follow(config, capacity=48_000, buckets=2, universe=1200, draws=250, steps=220)


@pytest.mark.parametrize("admit_after", [1, 3])
@pytest.mark.parametrize("evict", ["lfu", "ttl", "none"])
def test_two_rows_a_bucket_follow_the_rules(evict: str, admit_after: int) -> None:
    config = IdsConfig(evict=evict, admit_after=admit_after, halve_every=7, ttl_steps=20)
    follow(config, capacity=480, buckets=240, universe=2500, draws=150, steps=220)


def test_more_new_ids_a_step_than_rows_follow_the_rules() -> None:
    config = IdsConfig(halve_every=30, pending_share=2)
    follow(config, capacity=48_000, buckets=2, universe=1500, draws=1200, steps=90)


@pytest.mark.slow
@pytest.mark.parametrize("admit_after", [1, 3])
@pytest.mark.parametrize("evict", ["lfu", "ttl"])
@pytest.mark.parametrize(("capacity", "buckets"), [(1, 240), (700, 24), (48_000, 2)])
def test_thousands_of_steps_follow_the_rules(evict: str, admit_after: int, capacity: int, buckets: int) -> None:
    config = IdsConfig(evict=evict, admit_after=admit_after, halve_every=150, ttl_steps=90)
    follow(config, capacity, buckets, universe=1500, draws=200, steps=2500)
