"""Lay chosen rows of ragged columns out as one batch: compiled loops that hold no lock.

In:  columns of a block and the rows chosen.  Out: filled arrays.
Compiled by numba on first use and cached beside this file; numpy would need several passes over temporary arrays.
"""

import numba
import numpy as np

USER_ID, ITEM_ID, HISTORY_START, LABEL_BITS = range(4)
"""Columns of packed rows; a row's history ends where the next one's starts, so there is a row more than examples."""
STRIDE = 8
"""History ids are copied this many at a time."""
REFUSED = -1
"""In place of a user id: the row is not to be trained on, and its item id says why."""


def pack(
    user_id: np.ndarray,
    item_id: np.ndarray,
    offset: np.ndarray,
    label: np.ndarray,
    refused: np.ndarray,
    dtype: type[np.signedinteger],
) -> np.ndarray:
    """Return [rows + 1, 4]: what a row needs lies together, so a row taken at random costs one memory access."""
    rows = len(label)
    packed = np.empty((rows + 1, 4), dtype)
    packed[:rows, USER_ID], packed[:rows, ITEM_ID] = user_id, item_id
    packed[:, HISTORY_START] = offset
    packed[:rows, LABEL_BITS] = label.view(np.int32)
    if refused.any():
        wrong = np.flatnonzero(refused)
        packed[wrong, USER_ID], packed[wrong, ITEM_ID] = REFUSED, refused[wrong] - 1
    return packed


@numba.njit(nogil=True, cache=True)
def permutation(rows: int, seed: np.uint64) -> np.ndarray:
    """Return 0, 1, …, rows − 1 in random order, int32: Fisher and Yates, fed by SplitMix64 (Steele et al., 2014)."""
    order = np.arange(rows, dtype=np.int32)
    state = np.uint64(seed)
    for left in range(rows, 1, -1):
        state += np.uint64(0x9E3779B97F4A7C15)
        mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        # The upper half as a fraction of `left`: Lemire, 2019; the bias is below rows / 2³².
        chosen = np.int64(((mixed >> np.uint64(32)) * np.uint64(left)) >> np.uint64(32))
        order[left - 1], order[chosen] = order[chosen], order[left - 1]
    return order


@numba.njit(nogil=True, cache=True)
def count_rows(packed: np.ndarray, rows: np.ndarray, skipped: np.ndarray):  # noqa: ANN201  (numba infers)
    """Return how many of the rows are accepted and how many history ids they have; add the others to `skipped`."""
    accepted = 0
    history = 0
    for row in rows:
        if packed[row, 0] == -1:
            skipped[packed[row, 1]] += 1
        else:
            accepted += 1
            history += packed[row + 1, 2] - packed[row, 2]
    return accepted, history


@numba.njit(nogil=True, cache=True)
def lay_out(
    packed: np.ndarray,
    history: np.ndarray,
    rows: np.ndarray,
    ids: np.ndarray,
    length_B: np.ndarray,
    label_bits_B: np.ndarray,
    place: np.ndarray,
) -> None:
    """Append the accepted rows to a batch; `place` [2] says where it ends: examples, history ids.

    Both `history` and `ids` must have room for `STRIDE` more values than they hold.
    """
    count = len(length_B)
    at, cell = place[0], place[1] + 2 * count
    for row in rows:
        if packed[row, 0] == -1:
            continue
        ids[at] = packed[row, 0]
        ids[count + at] = packed[row, 1]
        label_bits_B[at] = packed[row, 3]
        first, last = packed[row, 2], packed[row + 1, 2]
        length_B[at] = last - first
        # Whole strides, so that no branch depends on the length of most histories: what is too much is overwritten.
        for stride in range(first, last, STRIDE):
            for k in range(STRIDE):
                ids[cell + stride - first + k] = history[stride + k]
        cell += last - first
        at += 1
    place[0], place[1] = at, cell - 2 * count


@numba.njit(nogil=True, cache=True)
def drop_unknown(  # noqa: ANN201  (numba infers)
    user_row: np.ndarray, item_row: np.ndarray, history_length: np.ndarray, values: np.ndarray, lengths: np.ndarray
):
    """Lay rows out for a lookup, leaving out those below 0; return how many there are.

    `item_row` holds B candidates, then the histories; `lengths` [3B] is filled.
    """
    count = len(user_row)
    at = 0
    for b in range(count):
        known = user_row[b] >= 0
        lengths[b] = known
        if known:
            values[at] = user_row[b]
            at += 1
    for b in range(count):
        known = item_row[b] >= 0
        lengths[count + b] = known
        if known:
            values[at] = item_row[b]
            at += 1
    cell = count
    for b in range(count):
        kept = 0
        for _ in range(history_length[b]):
            if item_row[cell] >= 0:
                values[at] = item_row[cell]
                at += 1
                kept += 1
            cell += 1
        lengths[2 * count + b] = kept
    return at
