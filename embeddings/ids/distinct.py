"""The distinct values of an array, by hashing.

In:  ids ≥ 0 in any order, repeated.  Out: each once, where each came from, how often.
Knows nothing of tables and buckets.
"""

import numpy as np
from numba import njit

from cluster.errors import DataError

ID_MAX = (1 << 63) - 1

_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio (Knuth's multiplicative hashing)
_NO_WEIGHTS = np.empty(0, np.int64)


def check_ids(ids: np.ndarray) -> np.ndarray:
    """Return ids as int64 for kernels. Raises `DataError` naming the first that is not in [0, 2⁶³)."""
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"ids are {ids.dtype} of shape {ids.shape}: must be one row of integers")
    wrong = ids > ID_MAX if ids.dtype == np.uint64 else ids < 0
    if wrong.any():
        at = int(wrong.argmax())
        raise DataError(f"id {ids[at]} at position {at}: must be at least 0 and below 2^63")
    return for_kernels(ids)


def for_kernels(numbers: np.ndarray) -> np.ndarray:
    """Return int64 that is contiguous and writable: a read-only array, as Arrow gives, is another type to compile."""
    return np.require(numbers, np.int64, ["C", "W"])


def distinct(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (ids, inverse, counts), all int64, ids in order of first occurrence; `ids[inverse]` is `values`.

    With weights (int64, one a value) `counts` sums them. Raises `DataError` naming the first id not in [0, 2⁶³).
    """
    values = check_ids(values)
    weights = _NO_WEIGHTS if weights is None else for_kernels(weights)
    ids, inverse, counts = (np.empty(values.size, np.int64) for _ in range(3))
    bits = max(int(2 * values.size - 1).bit_length(), 4)  # half full at most
    found = _distinct(values, weights, bits, ids, inverse, counts)
    return ids[:found], inverse, counts[:found]


@njit(nogil=True, cache=True)
def _distinct(
    values: np.ndarray, weights: np.ndarray, bits: int, ids: np.ndarray, inverse: np.ndarray, counts: np.ndarray
) -> int:
    slots = np.full(1 << bits, -1, np.int32)  # positions in ids: a quarter of the memory that keys would clear
    mask, shift = (1 << bits) - 1, np.uint64(64 - bits)
    found = 0
    for i in range(values.size):
        value = values[i]
        slot = np.int64((np.uint64(value) * _SPREAD) >> shift)
        at = slots[slot]
        while at >= 0 and ids[at] != value:
            slot = (slot + 1) & mask
            at = slots[slot]
        if at < 0:
            at = np.int32(found)
            slots[slot] = at
            ids[at] = value
            counts[at] = 0
            found += 1
        inverse[i] = at
        counts[at] += weights[i] if weights.size > 0 else 1
    return found
