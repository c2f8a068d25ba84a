"""Compiled loops over the id table: hash, find, count, expire, choose a victim, admit.

In:  a `Store` and the `Victims` of a range of buckets, int64 arrays of ids.  Out: rows and changed arrays.
Knows nothing of settings, steps gone by or errors: an offending id is returned by position, callers raise.
One file, longer than others, because numba's cache on disk looks for changes in a kernel's own file only: kernels that
call one another across files would run on with what they called before an upgrade.

**Slots.** Open addressing with linear probing, one region of `slots` a bucket, half full at most. A slot is a pair of
int64, key and place, in one cache line: place p ≥ 0 is row p, p < 0 is pending entry -1-p, both counted from the
store's first bucket. A deletion shifts entries behind it back, so there are no tombstones (Knuth, vol. 3, 6.4, R).

**Victims.** Which row a full bucket gives up next, exactly and without a scan for each. `row_use` (count << 31 | step
last seen) orders rows, ties by row. A survey scans the bucket once and keeps its K lowest rows in a heap, with a mark:
every row below the mark is in the heap. A row's use only grows between surveys, so an entry of the heap may be too
low, never too high: `next_victim` corrects the top until it is right, and surveys again when the heap has run out. Rows
used in this step (locked) are set aside and put back when the bucket is done. Heaps are derived from `row_use` alone:
decisions do not depend on when a survey was made, and checkpoints hold none.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from embeddings.ids.config import BUCKETS
from embeddings.vocabulary import UNKNOWN_ROW

EMPTY = -1
NEVER_USED = -1
STEP_BITS = 31
STEP_MASK = (1 << STEP_BITS) - 1
COUNT_MAX = (1 << 32) - 1
USE_MAX = (1 << 63) - 1
AHEAD = 64  # ids whose first slots are read together, so that their cache misses overlap
SURVEY_SHARE, SURVEY_LEAST = 8, 64  # a survey finds an eighth of a bucket's rows, 64 at least

kernel = njit(nogil=True, cache=True, error_model="numpy")  # no check for division by zero: sizes are above it

_BUCKETS = np.uint64(BUCKETS)
_HALF = np.uint64(32)
_SHIFT = np.uint64(33)
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)


class Store(NamedTuple):
    """The arrays of a contiguous range of buckets; every array is cut into equal parts, one a bucket."""

    slots: np.ndarray
    """int64 [slots, 2]: key and place."""
    row_id: np.ndarray
    """int64: the id that holds the row, or EMPTY."""
    row_use: np.ndarray
    """int64: count << 31 | step last seen; NEVER_USED before the first id. Smaller is less worth keeping."""
    pending_id: np.ndarray
    """int64: a ring of ids without a row, or EMPTY."""
    pending_count: np.ndarray
    """int64: how often each was seen."""
    pending_next: np.ndarray
    """int64, one a bucket: where the ring's next entry goes; what stands there is the oldest."""
    first_free: np.ndarray
    """int64, one a bucket: no row before this one is free."""
    first_bucket: int
    """The range's first bucket."""


class Victims(NamedTuple):
    """A heap of (use, row) and its mark for every bucket; rows set aside for the bucket at hand."""

    use: np.ndarray
    row: np.ndarray
    size: np.ndarray
    mark_use: np.ndarray
    mark_row: np.ndarray
    aside: np.ndarray
    asides: np.ndarray


def build_victims(buckets: int, per_bucket: int) -> Victims:
    """Return empty heaps, which the first question fills."""
    kept = min(per_bucket, max(SURVEY_LEAST, per_bucket // SURVEY_SHARE))
    return Victims(
        use=np.empty(buckets * kept, np.int64),
        row=np.empty(buckets * kept, np.int64),
        size=np.zeros(buckets, np.int64),
        mark_use=np.full(buckets, -1, np.int64),
        mark_row=np.zeros(buckets, np.int64),
        aside=np.empty(per_bucket, np.int64),
        asides=np.zeros(1, np.int64),
    )


@kernel
def mix(key: int) -> np.uint64:
    """Return 64 well-mixed bits of an id (MurmurHash3's finaliser: a bijection)."""
    h = np.uint64(key)
    h = (h ^ (h >> _SHIFT)) * _MIX_1
    h = (h ^ (h >> _SHIFT)) * _MIX_2
    return h ^ (h >> _SHIFT)


@kernel
def bucket_of(h: np.uint64) -> int:
    """Return the bucket, of all 240, that a mixed id falls into."""
    return int(np.int64(h % _BUCKETS))


@kernel
def home_of(h: np.uint64, base: int, size: int) -> int:
    """Return the slot where a mixed id's probing starts: the upper 32 bits scaled to the region."""
    return base + int(np.int64(((h >> _HALF) * np.uint64(size)) >> _HALF))


@kernel
def first_offender(ids: np.ndarray, first_bucket: int, buckets: int) -> int:
    """Return the position of the first id that is negative or in nobody's bucket here, or -1."""
    for i in range(ids.size):
        if ids[i] < 0 or not 0 <= bucket_of(mix(ids[i])) - first_bucket < buckets:
            return i
    return -1


@kernel
def buckets_of_ids(ids: np.ndarray) -> np.ndarray:
    """Return the bucket, of all 240, of every id."""
    buckets = np.empty(ids.size, np.int64)
    for i in range(ids.size):
        buckets[i] = bucket_of(mix(ids[i]))
    return buckets


@kernel
def find(slots: np.ndarray, home: int, base: int, size: int, key: int) -> int:
    """Return the key's slot, or -1-slot of the empty one where it would go."""
    slot = home
    while True:
        there = slots[slot, 0]
        if there == key:
            return slot
        if there == EMPTY:
            return -1 - slot
        slot += 1
        if slot == base + size:
            slot = base


@kernel
def find_in(slots: np.ndarray, size: int, bucket: int, key: int) -> int:
    """Return what `find` does, for a key of the local bucket, whose region has `size` slots."""
    return find(slots, home_of(mix(key), bucket * size, size), bucket * size, size, key)


@kernel
def insert(slots: np.ndarray, size: int, bucket: int, key: int, place: int) -> bool:
    """Write the key and its place; return whether the key is new."""
    slot = find_in(slots, size, bucket, key)
    is_new = slot < 0
    if is_new:
        slot = -1 - slot
        slots[slot, 0] = key
    slots[slot, 1] = place
    return is_new


@kernel
def delete(slots: np.ndarray, size: int, bucket: int, key: int) -> None:
    """Remove a key that is there, and close the gap."""
    base = bucket * size
    gap = find_in(slots, size, bucket, key)
    slot = gap
    while True:
        slot += 1
        if slot == base + size:
            slot = base
        if slots[slot, 0] == EMPTY:
            break
        # An entry may move back to the gap unless its home lies after the gap.
        from_home = slot - home_of(mix(slots[slot, 0]), base, size)
        from_gap = slot - gap
        if from_home + (size if from_home < 0 else 0) >= from_gap + (size if from_gap < 0 else 0):
            slots[gap, 0] = slots[slot, 0]
            slots[gap, 1] = slots[slot, 1]
            gap = slot
    slots[gap, 0] = EMPTY


@kernel
def probe(store: Store, ids: np.ndarray, found: np.ndarray) -> None:
    """Write each id's slot, or a negative number, into `found`. The ids are in the store's buckets."""
    slots, buckets = store.slots, store.pending_next.size
    size = slots.shape[0] // buckets
    there = np.empty(AHEAD, np.int64)
    for begin in range(0, ids.size, AHEAD):
        end = min(begin + AHEAD, ids.size)
        for i in range(begin, end):
            h = mix(ids[i])
            home = home_of(h, (bucket_of(h) - store.first_bucket) * size, size)
            found[i] = home
            there[i - begin] = slots[home, 0]
        for i in range(begin, end):
            if there[i - begin] != ids[i]:
                base = found[i] // size * size
                found[i] = find(slots, found[i], base, size, ids[i])


@kernel
def look_up(store: Store, ids: np.ndarray, rows: np.ndarray) -> None:
    """Write each id's global row, or UNKNOWN_ROW."""
    probe(store, ids, rows)
    first_row = store.first_bucket * (store.row_id.size // store.pending_next.size)
    for i in range(ids.size):
        place = store.slots[rows[i], 1] if rows[i] >= 0 else -1
        rows[i] = first_row + place if place >= 0 else UNKNOWN_ROW


@kernel
def count(store: Store, ids: np.ndarray, counts: np.ndarray, step: int, rows: np.ndarray, totals: np.ndarray) -> None:
    """Count the ids that have a row or are pending; write global rows (or UNKNOWN_ROW) and, for ids without, totals."""
    probe(store, ids, rows)
    first_row = store.first_bucket * (store.row_id.size // store.pending_next.size)
    for i in range(ids.size):
        totals[i] = min(counts[i], COUNT_MAX)
        if rows[i] < 0:
            rows[i] = UNKNOWN_ROW
            continue
        place = store.slots[rows[i], 1]
        if place >= 0:
            total = min((store.row_use[place] >> STEP_BITS) + counts[i], COUNT_MAX)
            store.row_use[place] = (total << STEP_BITS) | step
            rows[i] = first_row + place
        else:
            totals[i] = min(store.pending_count[-1 - place] + counts[i], COUNT_MAX)
            store.pending_count[-1 - place] = totals[i]
            rows[i] = UNKNOWN_ROW


@kernel
def halve(store: Store, victims: Victims, bucket: int) -> None:
    """Halve the counts of a local bucket's rows, rounding down."""
    per_bucket = store.row_id.size // store.pending_next.size
    for row in range(bucket * per_bucket, (bucket + 1) * per_bucket):
        if store.row_id[row] != EMPTY:
            use = store.row_use[row]
            store.row_use[row] = (use >> STEP_BITS >> 1 << STEP_BITS) | (use & STEP_MASK)
    victims.size[bucket] = 0
    victims.mark_use[bucket] = -1


@kernel
def expire(store: Store, bucket: int, step: int, ttl_steps: int) -> None:
    """Free a local bucket's rows that were last seen more than `ttl_steps` ago."""
    size = store.slots.shape[0] // store.pending_next.size
    per_bucket = store.row_id.size // store.pending_next.size
    for row in range((bucket + 1) * per_bucket - 1, bucket * per_bucket - 1, -1):
        seen = store.row_use[row] & STEP_MASK
        if store.row_id[row] != EMPTY and step - seen > ttl_steps:
            delete(store.slots, size, bucket, store.row_id[row])
            store.row_id[row] = EMPTY
            store.row_use[row] = seen
            store.first_free[bucket] = min(store.first_free[bucket], row)


@kernel
def is_less(use: int, row: int, other_use: int, other_row: int) -> bool:
    """Return whether the first is to be given up before the second."""
    return use < other_use or (use == other_use and row < other_row)


@kernel
def is_below_mark(victims: Victims, bucket: int, use: int, row: int) -> bool:
    """Return whether the heap must hold the row."""
    return is_less(use, row, victims.mark_use[bucket], victims.mark_row[bucket])


@kernel
def push(victims: Victims, bucket: int, use: int, row: int) -> None:
    """Add a row to the heap, or lower the mark to it where the heap is full."""
    kept = victims.use.size // victims.size.size
    if victims.size[bucket] == kept:
        victims.mark_use[bucket] = use
        victims.mark_row[bucket] = row
        return
    base, at = bucket * kept, int(victims.size[bucket])
    victims.size[bucket] += 1
    while at > 0:
        parent = (at - 1) // 2
        if not is_less(use, row, victims.use[base + parent], victims.row[base + parent]):
            break
        victims.use[base + at] = victims.use[base + parent]
        victims.row[base + at] = victims.row[base + parent]
        at = parent
    victims.use[base + at] = use
    victims.row[base + at] = row


@kernel
def remove_victim(victims: Victims, bucket: int) -> None:
    """Remove the heap's lowest row."""
    base = bucket * (victims.use.size // victims.size.size)
    victims.size[bucket] -= 1
    size = int(victims.size[bucket])
    use, row = int(victims.use[base + size]), int(victims.row[base + size])
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and is_less(
            victims.use[base + child + 1],
            victims.row[base + child + 1],
            victims.use[base + child],
            victims.row[base + child],
        ):
            child += 1
        if not is_less(victims.use[base + child], victims.row[base + child], use, row):
            break
        victims.use[base + at] = victims.use[base + child]
        victims.row[base + at] = victims.row[base + child]
        at = child
    victims.use[base + at] = use
    victims.row[base + at] = row


@kernel
def keep_victim(victims: Victims, row: int) -> None:
    """Set a locked row aside until its bucket is done."""
    victims.aside[victims.asides[0]] = row
    victims.asides[0] += 1


@kernel
def put_back(victims: Victims, row_use: np.ndarray, bucket: int) -> None:
    """Return to the heap what was set aside and still belongs into it."""
    for at in range(victims.asides[0]):
        row = int(victims.aside[at])
        if is_below_mark(victims, bucket, row_use[row], row):
            push(victims, bucket, row_use[row], row)
    victims.asides[0] = 0


@kernel
def survey(victims: Victims, row_use: np.ndarray, bucket: int, step: int) -> None:
    """Scan a bucket, all of whose rows have ids, for its K lowest rows that are not locked."""
    kept = victims.use.size // victims.size.size
    per_bucket = row_use.size // victims.size.size
    uses = np.empty(per_bucket, np.int64)
    unlocked = 0
    for row in range(bucket * per_bucket, (bucket + 1) * per_bucket):
        if row_use[row] & STEP_MASK != step:
            uses[unlocked] = row_use[row]
            unlocked += 1
    limit, ties = USE_MAX, 0
    if unlocked > kept:
        limit = np.partition(uses[:unlocked], kept - 1)[kept - 1]
        ties = kept - (uses[:unlocked] < limit).sum()
    victims.size[bucket] = 0
    victims.asides[0] = 0
    victims.mark_use[bucket] = limit
    victims.mark_row[bucket] = 0
    for row in range(bucket * per_bucket, (bucket + 1) * per_bucket):
        use = int(row_use[row])
        if use < limit:
            if use & STEP_MASK == step:
                keep_victim(victims, row)
            else:
                push(victims, bucket, use, row)
        elif use == limit and ties > 0:
            push(victims, bucket, use, row)
            victims.mark_row[bucket] = row + 1
            ties -= 1


@kernel
def next_victim(victims: Victims, row_use: np.ndarray, bucket: int, step: int) -> int:
    """Return the row to give up next, or -1 when every row is locked. It stays until `remove_victim`."""
    base = bucket * (victims.use.size // victims.size.size)
    was_surveyed = False
    while True:
        while victims.size[bucket] > 0:
            use, row = int(victims.use[base]), int(victims.row[base])
            if not is_below_mark(victims, bucket, use, row):
                break
            is_locked = row_use[row] & STEP_MASK == step
            if use == row_use[row] and not is_locked:
                return row
            remove_victim(victims, bucket)
            if is_locked:
                keep_victim(victims, row)
            elif is_below_mark(victims, bucket, row_use[row], row):
                push(victims, bucket, row_use[row], row)
        if was_surveyed:
            return -1
        survey(victims, row_use, bucket, step)
        was_surveyed = True


@kernel
def take_free(store: Store, bucket: int) -> int:
    """Return a local bucket's lowest free row, or -1. The caller fills it."""
    end = (bucket + 1) * (store.row_id.size // store.pending_next.size)
    row = store.first_free[bucket]
    while row < end and store.row_id[row] != EMPTY:
        row += 1
    store.first_free[bucket] = row
    return row if row < end else -1


@kernel
def wait(store: Store, bucket: int, key: int, total: int) -> None:
    """Remember an id without a row, in the place of the bucket's oldest such id."""
    size = store.slots.shape[0] // store.pending_next.size
    ring = store.pending_id.size // store.pending_next.size
    at = int(store.pending_next[bucket])
    if store.pending_id[at] != EMPTY:
        delete(store.slots, size, bucket, store.pending_id[at])
    store.pending_id[at] = key
    store.pending_count[at] = total
    insert(store.slots, size, bucket, key, -1 - at)
    store.pending_next[bucket] = at + 1 if at + 1 < (bucket + 1) * ring else bucket * ring


@kernel
def settle(store: Store, bucket: int, key: int, total: int, step: int, row: int) -> None:
    """Give a row to an id, which waits no longer."""
    size = store.slots.shape[0] // store.pending_next.size
    slot = find_in(store.slots, size, bucket, key)
    if slot >= 0:
        at = -1 - store.slots[slot, 1]
        store.pending_id[at] = EMPTY
        store.pending_count[at] = 0
        store.slots[slot, 1] = row
    else:
        store.slots[-1 - slot, 0] = key
        store.slots[-1 - slot, 1] = row
    store.row_id[row] = key
    store.row_use[row] = (total << STEP_BITS) | step


@kernel
def admit(
    store: Store,
    victims: Victims,
    ids: np.ndarray,
    totals: np.ndarray,
    order: np.ndarray,
    admit_after: int,
    is_lfu: bool,
    step: int,
    rows: np.ndarray,
    reused: np.ndarray,
) -> int:
    """Give rows to the ids at the positions `order`, grouped by bucket; return how many rows had another id before."""
    size = store.slots.shape[0] // store.pending_next.size
    per_bucket = store.row_id.size // store.pending_next.size
    first_row = store.first_bucket * per_bucket
    bucket, has_rows, reuses = -1, True, 0
    for i in order:
        key, total = int(ids[i]), int(totals[i])
        here = bucket_of(mix(key)) - store.first_bucket
        if here != bucket:
            if bucket >= 0 and is_lfu:
                put_back(victims, store.row_use, bucket)
            bucket, has_rows = here, True
        row = -1
        if total >= admit_after and has_rows:
            row = take_free(store, bucket)
            if row < 0:
                has_rows = is_lfu
                if is_lfu:
                    victim = next_victim(victims, store.row_use, bucket, step)
                    has_rows = victim >= 0
                    if has_rows and (store.row_use[victim] >> STEP_BITS) <= total:
                        row = victim
                        remove_victim(victims, bucket)
                        delete(store.slots, size, bucket, store.row_id[row])
                        keep_victim(victims, row)
        if row >= 0:
            if store.row_use[row] != NEVER_USED:
                reused[reuses] = first_row + row
                reuses += 1
            settle(store, bucket, key, total, step, row)
            rows[i] = first_row + row
        elif find_in(store.slots, size, bucket, key) < 0:
            wait(store, bucket, key, total)
    if bucket >= 0 and is_lfu:
        put_back(victims, store.row_use, bucket)
    return reuses


@kernel
def rebuild(store: Store) -> int:
    """Fill the empty slots from rows and pending ids; return the first id that repeats or is misplaced, or -1."""
    size = store.slots.shape[0] // store.pending_next.size
    buckets = store.pending_next.size
    for ids, is_row in ((store.row_id, True), (store.pending_id, False)):
        per_bucket = ids.size // buckets
        for at in range(ids.size):
            if ids[at] == EMPTY:
                continue
            bucket = at // per_bucket
            if ids[at] < 0 or bucket_of(mix(ids[at])) - store.first_bucket != bucket:
                return ids[at]
            if not insert(store.slots, size, bucket, ids[at], at if is_row else -1 - at):
                return ids[at]
    return -1


@kernel
def first_astray(store: Store) -> int:
    """Return an id that does not map back to the place that holds it, or -1."""
    size = store.slots.shape[0] // store.pending_next.size
    buckets = store.pending_next.size
    for ids, is_row in ((store.row_id, True), (store.pending_id, False)):
        per_bucket = ids.size // buckets
        for at in range(ids.size):
            if ids[at] != EMPTY:
                slot = find_in(store.slots, size, at // per_bucket, ids[at])
                if slot < 0 or store.slots[slot, 1] != (at if is_row else -1 - at):
                    return ids[at]
    return -1


@kernel
def group_by_owner(ids: np.ndarray, owner_of_bucket: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return positions grouped by the ids' owners, and write how many each owner has."""
    owners = owner_of_bucket[buckets_of_ids(ids)]
    for owner in owners:
        sizes[owner] += 1
    place = np.cumsum(sizes) - sizes
    order = np.empty(ids.size, np.int64)
    for i in range(ids.size):
        order[place[owners[i]]] = i
        place[owners[i]] += 1
    return order
