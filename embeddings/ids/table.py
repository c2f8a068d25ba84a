"""The id table: external int64 ids to the rows of an embedding table of fixed capacity, without collisions.

In:  the distinct ids of a step and how often each occurs.  Out: rows, and the rows that changed hands.
Knows nothing of vectors: who calls must zero reused rows and their optimiser state before the step.

A capacity is split into 240 buckets, as TorchRec's managed collision modules do; an id's hash names its bucket. A
bucket has its rows next to each other and decides by itself, so workers own whole buckets and every decision is the
same for any number of workers and any order of the ids. One step, in each bucket:

1. `lfu` with `halve_every`: the counts of 1/halve_every of the buckets are halved, rounding down (TinyLFU's reset).
2. An id with a row adds its occurrences to the row's count, which stops at 2³² - 1. The row is locked for this step.
3. `ttl`: buckets ≡ step (mod 60) free the rows last seen more than `ttl_steps` ago: each within 60 steps of its time.
4. An id without a row is pending (Monolith's admission, Liu et al., 2022): occurrences are counted exactly. Ids asked
   for in this step whose count has reached `admit_after` take rows, those with the higher count first (255 and more
   are equal), then the smaller id. Each takes the lowest free row of its bucket. If there is none:
   - `lfu` gives up the unlocked row with the lowest count (ties: longest unseen, then lowest row), if that count is
     no higher than the newcomer's own (TinyLFU's admission, Einziger et al., 2017). So once-seen ids only push out
     one another and cannot thrash rows in use, and a newcomer that keeps coming back gets in, as pending it is counted.
     The id pushed out starts from nothing: were its count remembered, two ids of equal count could swap for ever.
   - `ttl` and `none` refuse.
5. Refused ids stay pending. A bucket's pending ids are a ring: one that is not admitted is forgotten, with its count,
   once as many newcomers as the ring has places came after it, however often it was seen itself.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from cluster.errors import DataError
from embeddings.ids import kernels
from embeddings.ids.config import BUCKETS, IdsConfig, rows_per_bucket
from embeddings.ids.distinct import check_ids, for_kernels

SWEEP_STEPS = 60
"""With `ttl`, every bucket is swept once in so many steps: 4 of the 240 a step."""
STEP_MAX = (1 << 31) - 2
STATE: Mapping[str, type[np.generic]] = MappingProxyType(
    {
        "row_id": np.int64,
        "row_count": np.uint32,
        "row_seen": np.int32,
        "pending_id": np.int64,
        "pending_count": np.uint32,
        "pending_next": np.int32,
    }
)
"""The arrays of `IdTable.state` and their types."""


class IdTable:
    """The ids of a contiguous range of buckets of one embedding table."""

    def __init__(self, capacity: int, config: IdsConfig, buckets: range = range(BUCKETS)) -> None:
        """Start without ids. `capacity` is the whole table's, whatever share of the buckets is here."""
        if not 0 <= buckets.start < buckets.stop <= BUCKETS or buckets.step != 1:
            raise ValueError(f"{buckets}: must be a contiguous part of range({BUCKETS})")
        self.config = config
        self.buckets = buckets
        self.bucket_rows = rows_per_bucket(capacity)
        self.bucket_pending = max(1, int(self.bucket_rows * config.pending_share))
        here = len(buckets)
        self._victims = kernels.build_victims(here, self.bucket_rows)
        self._store = kernels.Store(
            slots=np.full((here * 2 * (self.bucket_rows + self.bucket_pending), 2), kernels.EMPTY, np.int64),
            row_id=np.full(here * self.bucket_rows, kernels.EMPTY, np.int64),
            row_use=np.full(here * self.bucket_rows, kernels.NEVER_USED, np.int64),
            pending_id=np.full(here * self.bucket_pending, kernels.EMPTY, np.int64),
            pending_count=np.zeros(here * self.bucket_pending, np.int64),
            pending_next=np.arange(here) * self.bucket_pending,
            first_free=np.arange(here) * self.bucket_rows,
            first_bucket=buckets.start,
        )

    def __len__(self) -> int:
        """Return how many ids have a row."""
        return int(np.count_nonzero(self._store.row_id != kernels.EMPTY))

    def assign(self, ids: np.ndarray, counts: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows, reused) of one global step, both global and int64; call it once a step, ids or none.

        In:  distinct ids of these buckets in any order, how often each occurs in the step, the step's number.
        Out: a row or `UNKNOWN_ROW` (-1) for each id; the rows that had an id before and now have a new one.

        Raises `DataError` for an id out of range, `ValueError` for one of another owner's bucket.
        """
        if not 0 <= step <= STEP_MAX:
            raise DataError(f"step {step}: must be in [0, {STEP_MAX}]")
        ids = self._own(ids)
        counts = for_kernels(counts)
        if counts.shape != ids.shape or (counts.size and counts.min() < 1):
            raise DataError(f"counts of shape {counts.shape} for {ids.size} ids: one a distinct id, each at least 1")
        rows, totals = np.empty_like(ids), np.empty_like(ids)
        self._halve(step)
        kernels.count(self._store, ids, counts, step, rows, totals)
        self._expire(step)
        order = self._admission_order(ids, totals, np.flatnonzero(rows < 0))
        reused = np.empty_like(order)
        is_lfu = self.config.evict == "lfu"
        reuses = kernels.admit(
            self._store, self._victims, ids, totals, order, self.config.admit_after, is_lfu, step, rows, reused
        )
        return rows, reused[:reuses]

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows that ids of these buckets have, or `UNKNOWN_ROW`; changes nothing. Raises as `assign`."""
        ids = self._own(ids)
        rows = np.empty_like(ids)
        kernels.look_up(self._store, ids, rows)
        return rows

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of all that decisions depend on, bucket after bucket.

        The arrays of owners of neighbouring buckets concatenate along axis 0 into the state of them together.
        """
        store = self._store
        return {
            "row_id": store.row_id.copy(),
            "row_count": np.where(store.row_use < 0, 0, store.row_use >> kernels.STEP_BITS).astype(np.uint32),
            "row_seen": np.where(store.row_use < 0, -1, store.row_use & kernels.STEP_MASK).astype(np.int32),
            "pending_id": store.pending_id.copy(),
            "pending_count": store.pending_count.astype(np.uint32),
            "pending_next": (store.pending_next - np.arange(len(self.buckets)) * self.bucket_pending).astype(np.int32),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Become what these buckets' state says. Raises `DataError` for arrays of another table or with broken ids."""
        store, here = self._store, np.arange(len(self.buckets))
        sizes = {name: getattr(store, name, store.row_id).size for name in STATE}
        for name, dtype in STATE.items():
            array = state.get(name)
            if array is None or array.shape != (sizes[name],) or array.dtype != dtype:
                held = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise DataError(f"id table state {name}: {held}; must be {np.dtype(dtype)} ({sizes[name]},)")
        seen = state["row_seen"].astype(np.int64)
        store.row_id[:] = state["row_id"]
        store.row_use[:] = np.where(seen < 0, -1, state["row_count"].astype(np.int64) << kernels.STEP_BITS | seen)
        store.pending_id[:] = state["pending_id"]
        store.pending_count[:] = state["pending_count"]
        store.pending_next[:] = state["pending_next"] + here * self.bucket_pending
        store.first_free[:] = here * self.bucket_rows
        store.slots.fill(kernels.EMPTY)
        self._victims = kernels.build_victims(len(here), self.bucket_rows)
        wrong = kernels.rebuild(store)
        if wrong != -1:
            raise DataError(f"id table state: id {wrong} stands twice or in a bucket that is not its own")

    def verify(self) -> None:
        """Check that every live row and pending id maps back to its place and nothing else is mapped: no collisions."""
        store = self._store
        if (astray := kernels.first_astray(store)) != -1:
            raise AssertionError(f"id {astray} does not map back to the place that holds it")
        held = len(self) + int(np.count_nonzero(store.pending_id != kernels.EMPTY))
        mapped = int(np.count_nonzero(store.slots[:, 0] != kernels.EMPTY))
        if held != mapped:
            raise AssertionError(f"{mapped} ids are mapped, {held} are held")

    def _own(self, ids: np.ndarray) -> np.ndarray:
        ids = check_ids(ids)
        at = kernels.first_offender(ids, self.buckets.start, len(self.buckets))
        if at >= 0:
            raise ValueError(f"id {ids[at]} at position {at}: falls into none of the buckets {self.buckets}")
        return ids

    def _halve(self, step: int) -> None:
        """Halve the buckets whose turn it is; turns are spread evenly over `halve_every` steps."""
        every = self.config.halve_every
        if self.config.evict == "lfu" and every:
            for bucket in self.buckets:
                if step % every == bucket * every // BUCKETS:
                    kernels.halve(self._store, self._victims, bucket - self.buckets.start)

    def _expire(self, step: int) -> None:
        if self.config.evict == "ttl":
            for bucket in self.buckets:
                if bucket % SWEEP_STEPS == step % SWEEP_STEPS:
                    kernels.expire(self._store, bucket - self.buckets.start, step, self.config.ttl_steps)

    def _admission_order(self, ids: np.ndarray, totals: np.ndarray, without_row: np.ndarray) -> np.ndarray:
        """Return positions by bucket, then by falling count up to 255, then by id."""
        by_id = without_row[np.argsort(ids[without_row])]
        group = kernels.buckets_of_ids(ids[by_id]) * 256 + (255 - np.minimum(totals[by_id], 255))
        # Sixteen bits and stable: numpy sorts by radix.
        return by_id[np.argsort(group.astype(np.uint16), kind="stable")]


def cut_state(state: Mapping[str, np.ndarray], buckets: range) -> dict[str, np.ndarray]:
    """Return a range of buckets' part of the state of all 240."""
    return {
        name: array[array.size // BUCKETS * buckets.start : array.size // BUCKETS * buckets.stop]
        for name, array in state.items()
    }
