"""What lists are like besides right: coverage, novelty, diversity, popularity, serendipity.

In:  lists of item rows; how many users have each item; item vectors or categories; lists of what is popular.
Out: one value a list, or one figure of all lists together.
Knows nothing of models. Places that hold nothing (`NO_ITEM`) do not count.

Surveys: Kaminskas and Bridge, TiiS 2016; Castells, Hurley and Vargas, Recommender Systems Handbook (2022), ch. 16.

Shapes: B lists, K places, I items, D dimension, C categories.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

from training.evaluation.lists import NO_ITEM, Hits, IntArray
from training.evaluation.metrics import FloatArray

BLOCK = 4_096
"""Lists whose item vectors are summed at once."""


def exposure(top_BK: IntArray, items: int) -> IntArray:
    """Return how many lists name each item."""
    return np.bincount(top_BK[top_BK != NO_ITEM], minlength=items)


def coverage(exposure_I: IntArray) -> float:
    """Return which share of the catalogue is in any list (Ge et al., RecSys 2010)."""
    return float((exposure_I > 0).mean())


def gini(exposure_I: IntArray) -> float:
    """Return how unequally lists name items: 0 all alike, towards 1 a single one (Adomavicius and Kwon, TKDE 2012).

    Σ (2i − I − 1) x_i / (I Σ x_i) with x ascending; items in no list count, as they do in RecBole.
    """
    ascending_I, items = np.sort(exposure_I), len(exposure_I)
    total = ascending_I.sum()
    return float((2 * np.arange(1, items + 1) - items - 1) @ ascending_I / (items * total)) if total else 0.0


def novelty(top_BK: IntArray, count_I: npt.ArrayLike, users: int) -> FloatArray:
    """Return the mean self-information of each list's items, in bits (Zhou et al., PNAS 2010).

    −log2(share of users who have the item); an item that nobody has counts as if one had it, as in RecTools.
    """
    bits_I = -np.log2(np.maximum(np.asarray(count_I, np.float64), 1) / users)
    return _mean_of_items(top_BK, bits_I)


def popularity(top_BK: IntArray, count_I: npt.ArrayLike) -> FloatArray:
    """Return how many users have a list's items, on average (ARP; Yin et al., VLDB 2012)."""
    return _mean_of_items(top_BK, np.asarray(count_I, np.float64))


def diversity(top_BK: IntArray, unit_ID: npt.NDArray[np.floating] | sparse.csr_array) -> FloatArray:
    """Return the mean of 1 − cosine over a list's pairs of items (Ziegler et al., WWW 2005); 0 for a single item.

    Vectors are of length 1, or all 0 for an item of which nothing is known, which is unlike any other. Of unit vectors
    Σ_pairs cosine = (‖Σv‖² − Σ‖v‖²) / 2: no pair is looked at.
    """
    squared_I = (unit_ID**2).sum(axis=1)
    blocks = [_diversity(top_BK[start : start + BLOCK], unit_ID, squared_I) for start in range(0, len(top_BK), BLOCK)]
    return np.concatenate(blocks) if blocks else np.empty(0)


def unit_vectors(vector_ID: npt.ArrayLike) -> npt.NDArray[np.floating]:
    """Return the vectors with length 1; those of length 0 stay."""
    vector = np.asarray(vector_ID)
    length_I1 = np.linalg.norm(vector, axis=1, keepdims=True)
    return vector / np.where(length_I1 > 0, length_I1, 1)


def category_vectors(categories_I: Sequence[Sequence[str]]) -> sparse.csr_array:
    """Return items' categories as unit vectors, [I, C]: the cosine of two items is |a∩b| / √(|a||b|)."""
    names = {name: None for categories in categories_I for name in categories}
    row_of = {name: row for row, name in enumerate(names)}
    distinct = [sorted({row_of[name] for name in categories}) for categories in categories_I]
    size_I = np.array([len(rows) for rows in distinct], np.int64)
    columns = np.array([row for rows in distinct for row in rows], np.int64)
    share_N = 1 / np.sqrt(np.repeat(size_I, size_I))
    indptr = np.concatenate([[0], np.cumsum(size_I)])
    return sparse.csr_array((share_N, columns, indptr), shape=(len(size_I), max(len(row_of), 1)))


def serendipity(hits: Hits, top_BK: IntArray, popular_BK: IntArray, k: int) -> FloatArray:
    """Return which share of k places holds what is relevant and not in the list of what is popular.

    Unexpected is what a primitive recommender would not have named (Ge et al., RecSys 2010).
    """
    expected_BK = np.zeros(top_BK[:, :k].shape, bool)
    for popular_B in popular_BK.T:  # place by place: a comparison of all with all would take B·K² bytes
        expected_BK |= top_BK[:, :k] == popular_B[:, None]
    return (hits.first(k).hit_BK & ~expected_BK).sum(axis=1) / k


def _mean_of_items(top_BK: IntArray, value_I: FloatArray) -> FloatArray:
    """Return the mean over each list's items of a value that items have; 0 for an empty list."""
    held_BK = top_BK != NO_ITEM
    return (value_I[top_BK] * held_BK).sum(axis=1) / held_BK.sum(axis=1).clip(min=1)


def _diversity(
    top_BK: IntArray, unit_ID: npt.NDArray[np.floating] | sparse.csr_array, squared_I: FloatArray
) -> FloatArray:
    held_BK = top_BK != NO_ITEM
    count_B = held_BK.sum(axis=1)
    indptr = np.concatenate([[0], np.cumsum(count_B)])
    lists_BI = sparse.csr_array((np.ones(indptr[-1]), top_BK[held_BK], indptr), shape=(len(top_BK), len(squared_I)))
    sum_BD = lists_BI @ unit_ID
    alike_B = (sum_BD**2).sum(axis=1) - lists_BI @ squared_I
    return np.where(count_B > 1, 1 - alike_B / (count_B * (count_B - 1)).clip(min=1), 0.0)
