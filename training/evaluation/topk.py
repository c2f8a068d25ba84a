"""The best k items of each user by score, what they have left out: exactly, in bounded memory, on every core.

In:  user and item vectors, or scores; what to leave out.  Out: item rows best first, `NO_ITEM` where none is left.
Knows nothing of models or metrics. Equal scores go in order of rows. A score of −∞ is that of an item not to be shown.

Scores are made block by block, small enough to stay in the cache, and read once: what is above a user's k-th best so
far is rare after the first blocks, and only that is looked up among the user's own items and put in its place. So the
matrix product is most of what it costs. Compiled by numba on first use and cached beside this file.

Shapes: U users, B of a block, I items, K places, D dimension.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numba
import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from cluster.errors import DataError
from training.evaluation.leakage import check_scores
from training.evaluation.lists import NO_ITEM, IntArray

FloatRows = npt.NDArray[np.float32]

USERS_AT_ONCE, ITEMS_AT_ONCE = 256, 512
"""A block of scores: half a MiB."""
CHUNK = 64
"""Scores whose largest is compared before they are looked at one by one."""


def top_items(
    user_UD: FloatRows, item_ID: FloatRows, exclude_UI: sparse.csr_array, k: int, *, threads: int | None = None
) -> tuple[IntArray, FloatRows]:
    """Return the `k` items of largest uᵀv for each user and their scores, both [U, K].

    Raises `DataError` where vectors have no finite products.
    """
    largest = item_ID.shape[1] * float(np.abs(user_UD).max(initial=0)) * float(np.abs(item_ID).max(initial=0))
    if not largest <= float(np.finfo(np.float32).max):
        raise DataError("a vector is not finite, or too long for scores to be, so nothing can be ranked")
    exclude = exclude_UI.sorted_indices()
    score_UK, row_UK = _empty_lists(len(user_UD), k)
    item = torch.from_numpy(item_ID)

    def fill(first_user: int) -> None:
        users = slice(first_user, first_user + USERS_AT_ONCE)
        user_BD = torch.from_numpy(user_UD[users])
        indptr = exclude.indptr[first_user : first_user + len(user_BD) + 1]
        for first_item in range(0, len(item_ID), ITEMS_AT_ONCE):
            score_BI = (user_BD @ item[first_item : first_item + ITEMS_AT_ONCE].T).numpy()
            _merge(score_BI, first_item, indptr, exclude.indices, score_UK[users], row_UK[users])

    with _one_thread_each(threads or torch.get_num_threads()) as pool:
        for _ in pool.map(fill, range(0, len(user_UD), USERS_AT_ONCE)):
            pass
    return row_UK, score_UK


def top_of_scores(score_BI: FloatRows, exclude_BI: sparse.csr_array, k: int) -> IntArray:
    """Return the `k` items of largest score for each row. Raises `DataError` for a score that is NaN or ∞."""
    check_scores(score_BI)
    exclude = exclude_BI.sorted_indices()
    score_BK, row_BK = _empty_lists(len(score_BI), k)
    _merge(np.ascontiguousarray(score_BI, np.float32), 0, exclude.indptr, exclude.indices, score_BK, row_BK)
    return row_BK


def popular_items(count_I: npt.NDArray[np.number], exclude_BI: sparse.csr_array, k: int) -> IntArray:
    """Return the `k` items that most users have, of those not to be left out, for each row: what needs no model."""
    enough = k + int(np.diff(exclude_BI.indptr).max(initial=0))  # nobody leaves out more of the first ones than that
    first_W = np.argsort(-count_I, kind="stable")[:enough]
    everyone_B1 = np.ones((len(exclude_BI.indptr) - 1, 1), np.float32)
    place_BK, _score_BK = top_items(everyone_B1, count_I[first_W, None].astype(np.float32), exclude_BI[:, first_W], k)
    return np.where(place_BK == NO_ITEM, NO_ITEM, first_W[place_BK])


def _empty_lists(lists: int, k: int) -> tuple[FloatRows, IntArray]:
    return np.full((lists, k), -np.inf, np.float32), np.full((lists, k), NO_ITEM, np.int64)


@contextmanager
def _one_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Run blocks side by side, each product on one thread: on several, every small product would wait for the last."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "top-items", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


@numba.njit(nogil=True, cache=True)
def _merge(score_BI, first_item, indptr, indices, score_BK, row_BK):  # noqa: ANN001, ANN202  (numba infers)
    """Put a block's scores into the lists, best first."""
    last = score_BK.shape[1] - 1
    for user in range(score_BI.shape[0]):
        score_I, best_K, row_K = score_BI[user], score_BK[user], row_BK[user]
        own = indices[indptr[user] : indptr[user + 1]]
        for start in range(0, len(score_I), CHUNK):
            end = min(start + CHUNK, len(score_I))
            largest = score_I[start]
            for score in score_I[start:end]:
                largest = score if score > largest else largest
            if largest <= best_K[last]:
                continue
            for column in range(start, end):
                score, item = score_I[column], first_item + column
                if score <= best_K[last]:
                    continue
                place = np.searchsorted(own, item)
                if place < len(own) and own[place] == item:
                    continue
                place = last
                while place > 0 and best_K[place - 1] < score:
                    best_K[place], row_K[place] = best_K[place - 1], row_K[place - 1]
                    place -= 1
                best_K[place], row_K[place] = score, item
