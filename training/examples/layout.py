"""Lay chosen rows of ragged columns out as one batch: compiled loops that hold no lock.

In:  columns of a block and the rows chosen.  Out: filled arrays.
Compiled by numba on first use and cached beside this file; numpy would need several passes over temporary arrays.
"""

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def count_rows(  # noqa: ANN201  (numba infers)
    offset: np.ndarray, refused: np.ndarray, rows: np.ndarray, skipped: np.ndarray
):
    """Return how many of the rows are accepted and how many history ids they have; add the others to `skipped`."""
    accepted = 0
    history = 0
    for row in rows:
        if refused[row]:
            skipped[refused[row] - 1] += 1
        else:
            accepted += 1
            history += offset[row + 1] - offset[row]
    return accepted, history


@numba.njit(nogil=True, cache=True)
def lay_out(
    user_id: np.ndarray,
    item_id: np.ndarray,
    history: np.ndarray,
    offset: np.ndarray,
    label: np.ndarray,
    refused: np.ndarray,
    rows: np.ndarray,
    ids: np.ndarray,
    length_B: np.ndarray,
    label_B: np.ndarray,
    place: np.ndarray,
) -> None:
    """Append the accepted rows to a batch; `place` [2] says where it ends: examples, history ids."""
    count = len(label_B)
    at, cell = place[0], place[1] + 2 * count
    for row in rows:
        if refused[row]:
            continue
        ids[at] = user_id[row]
        ids[count + at] = item_id[row]
        label_B[at] = label[row]
        first, last = offset[row], offset[row + 1]
        length_B[at] = last - first
        for source in range(first, last):
            ids[cell] = history[source]
            cell += 1
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
