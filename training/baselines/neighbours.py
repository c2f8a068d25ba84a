"""Collaborative filtering by neighbours: items that the same people have; people who have the same items, or like ones.

In:  who has what; for people by text, an encoder's vector of each item.  Out: scores.
Similarity of sets a and b of sizes |a| and |b| with n possible members: cosine |a∩b| / √(|a||b|), or Pearson's
correlation (n|a∩b| − |a||b|) / √(|a|(n − |a|)|b|(n − |b|)). `shrink` is added to the denominator, so
that little in common says little.

Item-based (Sarwar et al., WWW 2001): an item's score is the sum of its similarities to what the user has, over its k
nearest items. User-based (Herlocker et al., SIGIR 1999): the sum over the user's k nearest users who have it. By text,
users are alike whose items are told alike, though they have none in common: the cosine of their means.

Shapes: U users that are fitted on, B users that are scored, I items, E encoder dimension, N rows of a block.
"""

from abc import ABC, abstractmethod
from typing import Literal, Self

import numpy as np
from scipy import sparse

from cluster.errors import ConfigError
from training.baselines.interface import IntArray, Scores, join_sparse, split_sparse, with_popular

Similarity = Literal["cosine", "pearson"]
BLOCK = 512
"""Rows whose similarities to all others are worked out at once."""


class _Neighbours:
    """How many count, and how alike two are."""

    def __init__(self, neighbours: int = 100, similarity: Similarity = "cosine", shrink: float = 0.0) -> None:
        if neighbours < 1 or shrink < 0:
            raise ConfigError(f"neighbours={neighbours}, shrink={shrink}: must be at least 1, and 0 or more")
        if similarity not in ("cosine", "pearson"):
            raise ConfigError(f"similarity={similarity!r}: is none of cosine, pearson")
        self.neighbours, self.shrink = neighbours, shrink
        self.similarity: Similarity = similarity

    def _nearest(
        self,
        some_NM: sparse.csr_array,
        all_RM: sparse.csr_array | sparse.csc_array,
        members: int,
        exclude_N: np.ndarray,
    ) -> sparse.csr_array:
        """Return the similarity of each of some sets, of so many possible members, to its nearest of all, [N, R].

        Where one request after the other is answered, all are given by column: turning them each time costs more.
        """
        similarity_NR = _similarities(some_NM, all_RM, members, self.similarity, self.shrink)
        return _largest(similarity_NR, self.neighbours, exclude_N)


class ItemNeighbours(_Neighbours):
    """Item-based collaborative filtering."""

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Find each item's nearest items."""
        who_IU = sparse.csr_array(seen_UI.T)
        self.popularity_I = seen_UI.sum(axis=0).astype(np.float32)
        items = len(self.popularity_I)
        blocks = [
            self._nearest(
                who_IU[start : start + BLOCK],
                who_IU,
                members=len(seen_UI.indptr) - 1,
                exclude_N=np.arange(start, min(start + BLOCK, items)),
            )
            for start in range(0, items, BLOCK)
        ]
        return self._take(sparse.csr_array(sparse.vstack(blocks, format="csr")))

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Add up what each item's nearest items say."""
        return with_popular((seen_BI @ self._columns_II.T).toarray().astype(np.float32), seen_BI, self.popularity_I)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the nearest items."""
        return split_sparse("nearest", self.nearest_II) | {"popularity": self.popularity_I}

    def restore(self, arrays: dict[str, np.ndarray]) -> Self:
        """Take up the nearest items."""
        self.popularity_I = arrays["popularity"]
        return self._take(join_sparse("nearest", arrays, len(self.popularity_I)))

    def _take(self, nearest_II: sparse.csr_array) -> Self:
        self.nearest_II, self._columns_II = nearest_II, sparse.csc_array(nearest_II)  # whose rows need no turning
        return self


class _People(ABC):
    """All that is learned is who has what."""

    seen_UI: sparse.csr_array
    popularity_I: np.ndarray

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Remember who has what."""
        self.popularity_I = seen_UI.sum(axis=0).astype(np.float32)
        return self._take(seen_UI.copy())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return who has what."""
        return split_sparse("seen", self.seen_UI) | {"popularity": self.popularity_I}

    def restore(self, arrays: dict[str, np.ndarray]) -> Self:
        """Take up who has what."""
        self.popularity_I = arrays["popularity"]
        return self._take(join_sparse("seen", arrays, len(self.popularity_I)))

    @abstractmethod
    def _take(self, seen_UI: sparse.csr_array) -> Self:
        """Make ready to be asked."""


class UserNeighbours(_People, _Neighbours):
    """User-based collaborative filtering."""

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Add up what the nearest others have; nobody is their own neighbour."""
        blocks = [
            self._nearest(
                seen_BI[start : start + BLOCK],
                self._columns_UI,
                members=len(self.popularity_I),
                exclude_N=user_row_B[start : start + BLOCK],
            )
            @ self.seen_UI
            for start in range(0, len(user_row_B), BLOCK)
        ]
        scores_BI = sparse.vstack(blocks, format="csr").toarray().astype(np.float32)
        return with_popular(scores_BI, seen_BI, self.popularity_I)

    def _take(self, seen_UI: sparse.csr_array) -> Self:
        self.seen_UI, self._columns_UI = seen_UI, sparse.csc_array(seen_UI)
        return self


class TextNeighbours(_People):
    """User-based collaborative filtering, users being what a language model makes of the items that they have."""

    def __init__(self, vector_IE: np.ndarray, neighbours: int = 100) -> None:
        if neighbours < 1:
            raise ConfigError(f"neighbours={neighbours}: must be at least 1")
        self.vector_IE, self.neighbours = vector_IE.astype(np.float32), neighbours

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Add up what the users with the nearest means have; nobody is their own neighbour."""
        profile_BE = self._profiles(seen_BI)
        blocks = [
            # Rounded, so that equals stay equals whatever they are multiplied beside.
            _largest(
                (profile_BE[start : start + BLOCK] @ self._profile_UE.T).round(5),
                self.neighbours,
                user_row_B[start : start + BLOCK],
            )
            @ self.seen_UI
            for start in range(0, len(user_row_B), BLOCK)
        ]
        scores_BI = sparse.vstack(blocks, format="csr").toarray().astype(np.float32)
        return with_popular(scores_BI, seen_BI, self.popularity_I)

    def _take(self, seen_UI: sparse.csr_array) -> Self:
        self.seen_UI, self._profile_UE = seen_UI, self._profiles(seen_UI)
        return self

    def _profiles(self, seen_UI: sparse.csr_array) -> np.ndarray:
        """Return users' means at length 1, [U, E]; 0 of who has nothing that is told of."""
        items = len(self.popularity_I)  # whoever serves may be told of items put since
        profile_UE = seen_UI @ self.vector_IE[:items]
        length_U1 = np.linalg.norm(profile_UE, axis=1, keepdims=True)
        return profile_UE / np.where(length_U1 > 0, length_U1, 1.0)


def _similarities(
    some_NM: sparse.csr_array,
    all_RM: sparse.csr_array | sparse.csc_array,
    members: int,
    similarity: Similarity,
    shrink: float,
) -> np.ndarray:
    """Return the similarity of each of some sets to each of all, [N, R]; 0 where one is empty."""
    common_NR = (some_NM @ all_RM.T).toarray()
    size_N1, size_R = some_NM.sum(axis=1)[:, None], all_RM.sum(axis=1)
    if similarity == "cosine":
        above_NR, below_NR = common_NR, np.sqrt(size_N1 * size_R) + shrink
    else:
        above_NR = members * common_NR - size_N1 * size_R
        below_NR = np.sqrt(size_N1 * (members - size_N1) * size_R * (members - size_R)) + shrink * members
    return np.divide(above_NR, below_NR, out=np.zeros_like(common_NR), where=below_NR > 0)


def _largest(similarity_NR: np.ndarray, neighbours: int, exclude_N: np.ndarray) -> sparse.csr_array:
    """Return the largest positive similarities of each row, without that to the row excluded (below 0: none)."""
    rows = np.flatnonzero(exclude_N >= 0)
    similarity_NR[rows, exclude_N[rows]] = 0.0
    kept = min(neighbours, similarity_NR.shape[1])
    column_NK = np.argpartition(-similarity_NR, kept - 1, axis=1)[:, :kept]
    value_NK = np.maximum(np.take_along_axis(similarity_NR, column_NK, axis=1), 0.0)
    starts = np.arange(0, column_NK.size + 1, kept)
    nearest = sparse.csr_array((value_NK.ravel(), column_NK.ravel(), starts), shape=similarity_NR.shape)
    nearest.eliminate_zeros()
    return nearest
