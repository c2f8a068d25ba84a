"""How good lists are: NDCG, hit, recall, precision, F1, reciprocal rank and average precision, one value a list.

In:  item rows best first and the relevant items of each list.  Out: values a list, for means, intervals, paired tests.
Knows nothing of models or of how a list came about. No loop over lists: relevance is looked up in one sorted search.

Several items may be relevant, each as much as any other. Formulas after Manning, Raghavan and Schütze, Introduction to
Information Retrieval (2008), ch. 8, and Järvelin and Kekäläinen, TOIS 2002; where an ideal list is longer than k, the
best that k places can hold counts as 1. With one relevant item a list they are those of metrics.py, made from ranks.

Shapes: B lists, K places, I items.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cluster.errors import DataError
from training.evaluation.metrics import FloatArray

IntArray = npt.NDArray[np.int64]

NO_ITEM = -1
"""Fills a list that is shorter than others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """Which places of the lists hold a relevant item, and how many items are relevant."""

    hit_BK: npt.NDArray[np.bool_]
    relevant_B: IntArray

    def first(self, k: int) -> "Hits":
        """Return the hits among the first `k` places; lists that have fewer places have no hits in the others."""
        if k < 1:
            raise DataError(f"k={k}: a list has at least one place")
        return Hits(hit_BK=self.hit_BK[:, :k], relevant_B=self.relevant_B)


def find_hits(top_BK: npt.ArrayLike, relevant_BI: sparse.csr_array) -> Hits:
    """Return the hits of lists whose relevant items are the entries of a sparse matrix, list by list.

    Raises `DataError` where a list has nothing relevant (its values would not be defined: leave it out), where it names
    an item twice or one that is none, and where there are not as many lists as rows.
    """
    top = np.asarray(top_BK, np.int64)
    lists, items = size_of(relevant_BI)
    if top.ndim != 2 or len(top) != lists:
        raise DataError(f"{len(top):,} lists of items, but relevant ones of {lists:,}")
    check_lists(top, items)
    relevant = sparse.csr_array(relevant_BI, copy=False)
    if not relevant.has_canonical_format:
        relevant = relevant.copy()
        relevant.sum_duplicates()
    relevant_B = np.diff(relevant.indptr).astype(np.int64)
    if not relevant_B.all():
        raise DataError(f"{(relevant_B == 0).sum():,} of {lists:,} lists have nothing relevant; leave these out")
    return Hits(hit_BK=contains(relevant, top), relevant_B=relevant_B)


def contains(matrix_BI: sparse.csr_array, item_BK: IntArray) -> npt.NDArray[np.bool_]:
    """Return whether each item is an entry of its row; `NO_ITEM` never is."""
    matrix_BI = matrix_BI.sorted_indices()
    lists, items = size_of(matrix_BI)
    row_N = np.repeat(np.arange(lists), np.diff(matrix_BI.indptr))
    key_N = row_N * items + matrix_BI.indices
    key_BK = np.arange(len(item_BK))[:, None] * items + item_BK
    if not len(key_N):
        return np.zeros(item_BK.shape, bool)
    place_BK = np.searchsorted(key_N, key_BK).clip(max=len(key_N) - 1)
    return (key_N[place_BK] == key_BK) & (item_BK != NO_ITEM)


def size_of(matrix: sparse.csr_array) -> tuple[int, int]:
    """Return rows and columns; what SciPy tells of types has none."""
    return cast(tuple[int, int], matrix.shape)


def check_lists(top_BK: IntArray, items: int) -> None:
    """Raise `DataError` where lists name rows beyond the catalogue, or one twice."""
    if top_BK.size and (top_BK.min() < NO_ITEM or top_BK.max() >= items):
        raise DataError(f"a list names item {top_BK.max():,} or {top_BK.min():,}; rows go from 0 to {items - 1:,}")
    ordered_BK = np.sort(top_BK, axis=1)
    again_BK = (ordered_BK[:, 1:] == ordered_BK[:, :-1]) & (ordered_BK[:, 1:] != NO_ITEM)
    if again_BK.any():
        row = int(again_BK.any(axis=1).argmax())
        raise DataError(f"list {row:,} names item {ordered_BK[row, 1:][again_BK[row]][0]:,} twice")


def ndcg(hits: Hits, k: int) -> FloatArray:
    """Return DCG@k, Σ 1 / log2(1 + place) over hits, divided by that of the best list (Järvelin and Kekäläinen)."""
    hit_BK = hits.first(k).hit_BK
    discount_K = 1 / np.log2(np.arange(2.0, k + 2))
    ideal_K = np.cumsum(discount_K)
    return (hit_BK * discount_K[: hit_BK.shape[1]]).sum(axis=1) / ideal_K[hits.relevant_B.clip(max=k) - 1]


def hit(hits: Hits, k: int) -> FloatArray:
    """Return 1 where anything relevant is among the first k, else 0."""
    return (hits.first(k).hit_BK.sum(axis=1) > 0).astype(np.float64)


def recall(hits: Hits, k: int) -> FloatArray:
    """Return which share of the relevant items is among the first k (Manning et al., eq. 8.2)."""
    return hits.first(k).hit_BK.sum(axis=1) / hits.relevant_B


def precision(hits: Hits, k: int) -> FloatArray:
    """Return which share of k places holds relevant items; places of a short list hold none (Manning et al., 8.1)."""
    return hits.first(k).hit_BK.sum(axis=1) / k


def f1(hits: Hits, k: int) -> FloatArray:
    """Return the harmonic mean of precision and recall, 2·hits / (k + relevant) (van Rijsbergen 1979, ch. 7)."""
    return 2 * hits.first(k).hit_BK.sum(axis=1) / (k + hits.relevant_B)


def reciprocal_rank(hits: Hits, k: int) -> FloatArray:
    """Return 1 / place of the first hit among the first k, 0 for none (Voorhees, TREC-8 1999)."""
    hit_BK = hits.first(k).hit_BK
    return hit_BK.any(axis=1) / (1.0 + hit_BK.argmax(axis=1))


def average_precision(hits: Hits, k: int) -> FloatArray:
    """Return Σ precision at each hit / min(k, relevant), 1 for the best list there is (Manning et al., 8.8)."""
    hit_BK = hits.first(k).hit_BK
    precision_BK = np.cumsum(hit_BK, axis=1) / np.arange(1, hit_BK.shape[1] + 1)
    return (precision_BK * hit_BK).sum(axis=1) / np.minimum(hits.relevant_B, k)


LIST_METRICS: dict[str, Callable[[Hits, int], FloatArray]] = {
    "ndcg": ndcg,
    "hit": hit,
    "recall": recall,
    "precision": precision,
    "f1": f1,
    "mrr": reciprocal_rank,
    "map": average_precision,
}


def list_values(hits: Hits, k: int) -> dict[str, FloatArray]:
    """Return all metrics at k, one value a list, under names such as `ndcg_at_10`."""
    return {f"{name}_at_{k}": metric(hits, k) for name, metric in LIST_METRICS.items()}
